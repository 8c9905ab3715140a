"""The models of ``t2l chat`` and ``t2l ui``: a base model beside adapters of texts, from command-line options."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from t2l_engine.cli import common
from t2l_engine.cli.common import DType, EngineOptions
from t2l_engine.cli.export import GGUF, save_gguf
from t2l_engine.files.text import headline
from t2l_engine.serving.side_by_side import SideBySide
from t2l_engine.text import base_model as models
from t2l_engine.text import packaged


@dataclasses.dataclass(frozen=True)
class Desk:
    """``side_by_side`` answers; ``base_model``: name of its base model."""

    side_by_side: SideBySide
    base_model: str

    def read(self, file: Path, option: str) -> str:
        """The document in ``file``; ValueError or OSError, naming ``option``, also if the checkpoint reads none."""
        common.expect_documents(option, self.side_by_side.engine)
        return common.read_text(file, option)

    def save(self, description: str, path: Path) -> None:
        """Write the adapter of ``description``, or document, to FILE.gguf or as a PEFT folder; ValueError or OSError."""
        engine = self.side_by_side.engine
        shown = headline(description) if self.side_by_side.documents else description
        stack = self.side_by_side.run(lambda: engine.generate([description]))
        if path.suffix.lower() == GGUF:
            save_gguf(stack, 0, path, self.side_by_side.model.config, description=shown, engine=engine)
        else:
            stack.save_pretrained(path, base_model_name_or_path=packaged.hub_name(self.base_model))


def open_desk(options: EngineOptions, *, slots: int, max_new_tokens: int, dtype: DType | None) -> Desk:
    """Load checkpoint and base model; ValueError if answers of ``max_new_tokens`` do not fit the model's context."""
    engine, folder = options.load()
    common.expect_descriptions(folder)
    name = common.base_model_of(folder, options.base_model)
    model, tokenizer = models.load(name, common.base_dtype(dtype))
    side_by_side = SideBySide(engine, model, tokenizer, slots=slots)
    side_by_side.check_length(max_new_tokens)
    return Desk(side_by_side, name)
