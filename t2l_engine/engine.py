"""TextToLoRA and DocToLoRA: descriptions or documents to adapters, by an encoder and a hypernetwork."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from t2l_engine.adapters.stack import AdapterStack
from t2l_engine.files.errors import short_repr
from t2l_engine.files.text import to_json
from t2l_engine.hypernetwork.checkpoint import has_described_prompts, read
from t2l_engine.hypernetwork.folder import CheckpointError, Contents, UndefinedEncoder, resolve_checkpoint
from t2l_engine.hypernetwork.network import HyperNetwork, load, save
from t2l_engine.hypernetwork.tokens import TokenHyperNetwork
from t2l_engine.library import AdapterLibrary, Match
from t2l_engine.lora.handle import LoRAHandle
from t2l_engine.text.config import AnyEncoderConfig, DocumentEncoderConfig, OneHotConfig
from t2l_engine.text.documents import DocumentEncoder
from t2l_engine.text.encoder import MINILM, OneHotEncoder, TextEncoder, WorkedExamples
from t2l_engine.text.prompts import CHAT, prompt_of


def _encoder_config(contents: Contents, folder: Path, given: str | Path | None) -> AnyEncoderConfig | str | None:
    """Configuration of the encoder of a checkpoint in ``folder``; its model is in the folder ``given`` unless that is None.

    A string is a sentence-transformers folder that states the configuration; None: the checkpoint does not state one.
    """
    try:
        config = contents.encoder_config()
    except UndefinedEncoder:
        if given is None:
            raise
        config = None
    if given is None:
        return config
    if config is None and str(given) == MINILM.name:
        return MINILM
    if isinstance(config, OneHotConfig):
        raise ValueError(f"encoder: expected none, since {folder} knows tasks by their names (one-hot), got {str(given)!r}")
    if config is not None and str(given) == config.name:
        return config
    if not Path(given).is_dir():
        raise FileNotFoundError(f"encoder {str(given)!r}: no such folder")
    if config is None:
        return str(given)
    return dataclasses.replace(config, name=str(given))


class TextToLoRA:
    """Task descriptions to LoRA adapters in one call (paper section 3); ``encoder`` and ``hypernetwork`` also work alone.

    >>> import t2l_engine as t2l
    >>> engine = t2l.TextToLoRA.from_pretrained("smollm2-135m")
    >>> stack = engine.generate(["Return the last element of the list.", "Give the antonym of the word."])
    >>> len(stack), stack.scaling.tolist()
    (2, [2.0, 2.0])
    """

    def __init__(
        self,
        encoder: TextEncoder | OneHotEncoder,
        hypernetwork: HyperNetwork,
        prompt_form: str = CHAT,
        *,
        description_in_prompt: bool = False,
    ):
        """``prompt_form``: "chat" or "raw", the prompt template of :meth:`prompt`; ``description_in_prompt``: whether the
        checkpoint was trained with the description in the prompts, too.

        Raises ValueError if the width of the encoder's embeddings is not the hypernetwork's ``embed_dim``.
        """
        if encoder.embed_dim != hypernetwork.config.embed_dim:
            raise ValueError(
                f"encoder: expected embeddings of width {hypernetwork.config.embed_dim} as the hypernetwork was trained "
                f"with, got {encoder.embed_dim} from {encoder.config.name!r}; pass encoder=..."
            )
        self.encoder, self.hypernetwork, self.prompt_form = encoder, hypernetwork, prompt_form
        self.description_in_prompt = description_in_prompt

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        *,
        encoder: TextEncoder | OneHotEncoder | DocumentEncoder | str | Path | None = None,
        scaling: str | float | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        module_order: list[str] | None = None,
        trust_remote_code: bool = False,
    ) -> TextToLoRA:
        """Load a bundled checkpoint by name ("smollm2-135m"), or a folder in native, Sakana or Doc-to-LoRA format.

        A checkpoint that reads texts token by token becomes a :class:`DocToLoRA`.

        Args:
            encoder: of the texts; None = the one the checkpoint was trained with (MiniLM if it names none).  A local
                folder: the files of that encoder, with pooling, template, length and dtype of the checkpoint; if the
                checkpoint does not state them, a sentence-transformers folder, which does.  The encoder's own name: as None.
            trust_remote_code: run the Python code that the encoder's configuration names (``auto_map``), also of other
                repositories; off by default.
            scaling, dtype, device, module_order: as in :meth:`HyperNetwork.from_pretrained`.

        Raises:
            FileNotFoundError: no such checkpoint or encoder folder, or the packaged encoder is not installed.
            OSError: the checkpoint's encoder is neither a local folder nor available from the hub; pass ``encoder``.
            ValueError: the checkpoint cannot be used, or the encoder does not fit it or needs ``trust_remote_code``.
        """
        folder = resolve_checkpoint(checkpoint)
        contents = read(folder, module_order)
        hypernetwork = load(contents, scaling=scaling, dtype=dtype, device=device)
        by_token = isinstance(hypernetwork, TokenHyperNetwork)
        expected = f"expected one that {'reads texts token by token' if by_token else 'embeds texts'}"
        if encoder is None or isinstance(encoder, (str, Path)):
            config = _encoder_config(contents, folder, encoder)
            if isinstance(config, DocumentEncoderConfig) != by_token:
                raise CheckpointError(f"{folder}: encoder: {expected}, got {short_repr(config)}")
            if isinstance(config, OneHotConfig):
                encoder = OneHotEncoder(config, device=device)
            elif isinstance(config, DocumentEncoderConfig):
                encoder = DocumentEncoder.from_config(config, device=device, trust_remote_code=trust_remote_code)
            else:
                encoder = TextEncoder.from_pretrained(config or MINILM, device=device, trust_remote_code=trust_remote_code)
        if isinstance(encoder, DocumentEncoder) and isinstance(hypernetwork, TokenHyperNetwork):
            return DocToLoRA(encoder, hypernetwork, contents.prompt_form)
        if isinstance(encoder, DocumentEncoder) or isinstance(hypernetwork, TokenHyperNetwork):
            raise ValueError(f"encoder: {expected}, as {folder}, got {type(encoder).__name__}")
        described = has_described_prompts(contents.blocks)
        return cls(encoder, hypernetwork, contents.prompt_form, description_in_prompt=described)

    def generate(self, texts: Sequence[str], examples: WorkedExamples = None) -> AdapterStack:
        """One adapter per description (per task name, for a checkpoint with one-hot embeddings), all in one pass.

        ``examples``: of each text, worked examples (input, answer) or None, for a checkpoint whose encoder is a
        :class:`DocumentEncoder` with ``max_examples``; a text with examples may be empty.

        Raises ValueError for an empty list, an empty text, anything but strings, an unknown task name, or examples for an
        encoder that reads none; RuntimeError if the language model is the encoder and has adapters in use.  A description
        longer than the encoder's length is truncated with a warning.
        """
        return self.hypernetwork.generate(self.embed(texts, examples))

    def save_pretrained(self, folder: str | Path, base_model: str | None = None) -> None:
        """Write hypernetwork and encoder as a native checkpoint; ``base_model``: name of the model that adapters are for.

        Raises as :meth:`HyperNetwork.save_pretrained`.
        """
        save(self.hypernetwork, Path(folder), {"encoder": to_json(self.encoder.config), "base_model": base_model})

    def retrieve(
        self, texts: Sequence[str], library: AdapterLibrary, min_similarity: float = -1.0
    ) -> tuple[AdapterStack, list[Match | None]]:
        """One adapter per text, and the stored one of ``library`` that it is, None for a generated one.

        ``min_similarity``: a text gets the nearest stored adapter if the cosine to its descriptions is at least this.

        Raises ValueError for a library of other modules, and as :meth:`AdapterLibrary.adapters`.
        """
        own, stored = self.hypernetwork.meta_stack(1).sizes, library.stack.sizes
        if not own.keys() & stored.keys() or any(stored[name] != own[name] for name in own.keys() & stored.keys()):
            raise ValueError(
                f"library: expected adapters of modules (layers, in, out) {short_repr(own)}, as this checkpoint's, "
                f"got {short_repr(stored)}"
            )
        return library.adapters(texts, self.generate, min_similarity)

    def generate_into(
        self, lora: LoRAHandle, slot: int, texts: Sequence[str], examples: WorkedExamples = None, **reading: Any
    ) -> None:
        """Generate the adapters of ``texts`` into the slots of ``lora`` from ``slot`` on, without a stack between.

        ``reading``: further arguments of :meth:`embed`.
        A and B are those of :meth:`generate`, rounded once to the slots' dtype.  The adapted layers must be on the device
        of the hypernetwork; otherwise use :meth:`generate` and :meth:`LoRAHandle.put`.

        Raises as :meth:`generate` and :meth:`LoRAHandle.borrow_slots`, and ValueError for layers on another device; nothing
        changes then.

        >>> import t2l_engine as t2l
        >>> from t2l_engine.text import packaged
        >>> model, tokenizer = packaged.load()
        >>> engine, lora = t2l.TextToLoRA.from_pretrained("smollm2-135m"), t2l.attach(model, slots=8)
        >>> engine.generate_into(lora, 3, ["Return the last element of the list.", "Give the antonym of the word."])
        >>> lora.set([3, 4, -1])
        """
        embeddings = self.embed(texts, examples, **reading)
        with lora.borrow_slots(slot, self._like(embeddings), device=self.hypernetwork.device) as out:
            self.hypernetwork.generate(embeddings, out=out)

    def _like(self, embeddings: Any) -> AdapterStack:
        return self.hypernetwork.meta_stack(len(embeddings))

    def embed(self, texts: Sequence[str], examples: WorkedExamples = None) -> torch.Tensor:
        """What ``hypernetwork.generate`` takes: ``task_emb [texts, embed_dim]``, on the hypernetwork's device."""
        return self.encoder.encode(texts, examples=examples).to(self.hypernetwork.device)

    def prompt(self, tokenizer: Any, text: str, description: str = "") -> str:
        """The prompt for ``text``, by the template that the checkpoint was trained with.

        Its ids are those of :func:`t2l_engine.text.prompts.prompt_ids`.

        ``tokenizer``: the base model's; ``description``: put first, for a checkpoint that was trained with descriptions in
        the prompt; ValueError if it was (:attr:`description_in_prompt`) and there is none.
        """
        if self.description_in_prompt and not description:
            raise ValueError("description: expected the task's, for the checkpoint was trained with it in prompts, got ''")
        return prompt_of(self.prompt_form, tokenizer, text, description)


class DocToLoRA(TextToLoRA):
    """An engine that reads sentences or documents token by token; :meth:`TextToLoRA.from_pretrained` makes one.

    A text is read in one chunk or more, whose adapters follow each other along the rank.

    Source: arXiv 2602.15902; of pointer networks, see :class:`PointerHyperNetwork`.

    >>> import t2l_engine as t2l
    >>> from t2l_engine.text import packaged
    >>> (model, tokenizer), reads = packaged.load(), t2l.DocumentEncoderConfig("smollm2-135m", "last", num_layers=4)
    >>> config = t2l.PerceiverConfig(variant="perceiver-flat", modules=("down_proj",), in_features=(1536,),
    ...     out_features=(576,), num_layers=30, rank=2, lora_alpha=4, feature_size=576, latent_size=16, num_latents=8,
    ...     num_blocks=1)
    >>> engine = t2l.DocToLoRA(t2l.DocumentEncoder(model, tokenizer, reads), t2l.PerceiverHyperNetwork(config))
    >>> stack = engine.generate(["The bakery opens at seven. " * 9, "It rains."], max_chunk_tokens=40)
    >>> stack.ranks["down_proj"][:, 0].tolist()  # two chunks or one, and the bias
    [6, 4]
    """

    encoder: DocumentEncoder  # pyright: ignore[reportIncompatibleVariableOverride]
    hypernetwork: TokenHyperNetwork  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, encoder: DocumentEncoder, hypernetwork: TokenHyperNetwork, prompt_form: str = CHAT):
        """``prompt_form``: as in :class:`TextToLoRA`.

        Raises ValueError if the hidden states that the encoder reads are not those that the hypernetwork was trained with.
        """
        config = hypernetwork.config
        wanted = config.feature_size, config.num_layers if config.per_layer else 1
        if (encoder.feature_size, encoder.num_states) != wanted:
            raise ValueError(
                f"encoder: expected hidden states of width {wanted[0]} of {wanted[1]} layers, as the hypernetwork was "
                f"trained with, got width {encoder.feature_size} of {encoder.num_states} from {encoder.config.name!r}"
            )
        self.encoder, self.hypernetwork, self.prompt_form = encoder, hypernetwork, prompt_form
        self.description_in_prompt = False

    def generate(
        self, texts: Sequence[str], examples: WorkedExamples = None, *, max_chunk_tokens: int | None = None
    ) -> AdapterStack:
        """One adapter per text, of rank ``(chunks + bias) * rank``; other arguments as in :meth:`TextToLoRA.generate`.

        ``max_chunk_tokens``: see :meth:`embed`.

        Raises as :meth:`TextToLoRA.generate` and :meth:`DocumentEncoder.chunks`.
        """
        return self.hypernetwork.generate(self.embed(texts, examples, max_chunk_tokens=max_chunk_tokens))

    def embed(
        self, texts: Sequence[str], examples: WorkedExamples = None, *, max_chunk_tokens: int | None = None
    ) -> list[torch.Tensor]:
        """Of each text its latents ``[chunks, *config.latent_shape]``.

        ``max_chunk_tokens``: a longer text is cut into chunks of equal length, at most this; None: as the encoder's
        configuration says.
        """
        return self.embed_ids(self.encoder.chunks(texts, max_chunk_tokens, examples))

    def _like(self, embeddings: list[torch.Tensor]) -> AdapterStack:
        return self.hypernetwork.meta_stack([len(latents) for latents in embeddings])

    @torch.no_grad()
    def embed_ids(self, contexts: Sequence[Sequence[Sequence[int]]]) -> list[torch.Tensor]:
        """As :meth:`embed`, of contexts, each a list of chunks of token ids; no tokenizer is needed.

        Raises ValueError for an empty list, a context without chunks, or a chunk that is empty, longer than the model's
        positions or with ids outside of its vocabulary.
        """
        rows = iter(self.hypernetwork.read(self.encoder.read(contexts)))
        return [torch.stack([*itertools.islice(rows, len(chunks))]) for chunks in contexts]
