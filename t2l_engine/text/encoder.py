"""TextEncoder: task descriptions to embeddings by a frozen transformer; OneHotEncoder: task names to unit vectors."""

from __future__ import annotations

import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from t2l_engine.files.errors import short_repr
from t2l_engine.files.text import is_unicode
from t2l_engine.ops.reference import without_autocast
from t2l_engine.text import dtypes
from t2l_engine.text.bert import PackedBert, is_plain
from t2l_engine.text.config import DocumentEncoderConfig, EncoderConfig, OneHotConfig
from t2l_engine.text.packaged import no_adapter, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MINILM = EncoderConfig(name="minilm", pooling="mean", max_length=256)
CACHE_SIZE = 4096
#: Of each text, worked examples (input, answer), or None.
WorkedExamples = Sequence[Sequence[tuple[str, str]] | None] | None


def normalise_description(text: str, full_stop: bool = True) -> str:
    """Strip white space and, with ``full_stop``, append "." to a text that ends in a letter (as SakanaAI's code)."""
    text = text.strip()
    return text + "." if full_stop and text and text[-1].isalpha() else text


def check_list(texts: Any, name: str = "texts") -> None:
    """ValueError, naming ``name``, unless ``texts`` is a list, or another sequence that is no string."""
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise ValueError(f"{name}: expected a list of strings, got {type(texts).__name__}; wrap one text in a list")


def check_text(name: str, text: Any, what: str) -> None:
    """ValueError, naming ``name``, unless ``text`` is a string of Unicode with ``what`` in it, not only white space."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name}: expected a non-empty {what}, got {short_repr(text)}")
    if not is_unicode(text):
        raise ValueError(f"{name}: expected Unicode text, got bytes that are no UTF-8: {short_repr(text)}")


def refuse_examples(name: str, examples: Any) -> None:
    """ValueError for any ``examples``: the encoder ``name`` reads none."""
    if examples is not None and any(examples):
        raise ValueError(
            f"examples: expected none, since the encoder of this checkpoint, {name!r}, reads descriptions alone; "
            f"got some for {sum(map(bool, examples))} texts"
        )


class Modules:
    """The modules of an encoder, valid until one is added, replaced or removed."""

    def __init__(self, model: nn.Module):
        self._all = [(module, dict(module._modules)) for module in model.modules()]
        modules = [module for module, _ in self._all]
        self._ours: list[Any] = [m for m in modules if hasattr(type(m), "adapted")]  # LoRALinear, of a room above
        self._of_peft: list[Any] = [
            m for m in modules if hasattr(type(m), "active_adapters") and hasattr(m, "merged_adapters")
        ]
        self.bert = PackedBert(model, modules) if is_plain(modules) else None

    def refuse_adapters(self, name: str) -> None:
        """RuntimeError, naming the encoder ``name``, if adapters are in use: ours, or PEFT's, which models may have too."""
        of_peft = (m.merged_adapters or (m.active_adapters and not m.disable_adapters) for m in self._of_peft)
        if any(module.adapted for module in self._ours) or any(of_peft):
            raise RuntimeError(
                f"encoder {name!r}: adapters are in use on this model, which would change the embeddings; "
                "embed outside of use(...), or detach() first (PEFT's: disable or unload them)"
            )

    @property
    def training(self) -> bool:
        return any(module.training for module, _ in self._all)

    def current(self, model: nn.Module) -> Modules:
        """These if they still are those of ``model``, else its own."""
        same = self._all[0][0] is model and all(module._modules == children for module, children in self._all)
        return self if same else Modules(model)


class TextEncoder:
    """A frozen transformers encoder with pooling: texts to ``task_emb``, L2-normalised, times sqrt(embed_dim).

    Embeddings of the ``cache_size`` most recently used texts are kept (4096 by default, 6 MB at 384 floats each), except in
    training mode; changed weights take effect on new texts.  Embeddings do not depend on padding, which is masked and on the
    right, or on the batch.  Plain BERT models in float32 on a CPU, such as MiniLM, run without padding and without
    transformers' forward, unless a module is replaced, hooked or in training mode.  Several threads may call :meth:`encode`.

    Source: paper section 3; pooling and normalisation of SakanaAI's embedding code.

    >>> import t2l_engine as t2l
    >>> encoder = t2l.TextEncoder.from_pretrained("minilm")
    >>> task_emb = encoder.encode(["Name the capital of the country.", "Translate to French"])
    >>> task_emb.shape, task_emb.norm(dim=1).round().tolist()  # [N, embed_dim]; norm sqrt(384)
    (torch.Size([2, 384]), [20.0, 20.0])
    """

    #: Most worked examples of a text that are read.
    max_examples = 0

    def __init__(self, model: PreTrainedModel, tokenizer: Any, config: EncoderConfig, *, cache_size: int = CACHE_SIZE):
        """``model``: a transformers encoder or decoder, such as ``get_decoder()`` of a causal LM, set to eval mode;
        ``tokenizer``: its tokenizer.  Neither is copied.

        ``cache_size``: number of texts whose embeddings are kept, 0 for none.

        Raises ValueError if ``max_length`` leaves no token for the text, or for a ``cache_size`` below 0.
        """
        if not isinstance(cache_size, int) or isinstance(cache_size, bool) or cache_size < 0:
            raise ValueError(f"cache_size: expected a number of texts, 0 or more, got {short_repr(cache_size)}")
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config
        self._cache_size = cache_size
        self._cache: OrderedDict[str, Tensor] = OrderedDict()  # the least recently used text first
        self._cache_lock = threading.Lock()
        self._modules = Modules(self.model)
        #: In tokens, including special ones, to which texts are truncated: the configuration's, at most the model's.
        self.max_length = min(config.max_length, positions(model) or config.max_length)
        special = tokenizer.num_special_tokens_to_add()
        if self.max_length <= special:
            raise ValueError(
                f"encoder {config.name!r}: max_length: expected more than the {special} special tokens of every text, "
                f"got {self.max_length}"
            )

    @classmethod
    def from_pretrained(
        cls,
        config: EncoderConfig | str | Path = MINILM,
        *,
        device: str | torch.device = "cpu",
        trust_remote_code: bool = False,
        dtype: torch.dtype | None = None,
    ) -> TextEncoder:
        """Load an encoder.

        Args:
            config: an :class:`EncoderConfig`; "minilm" for the packaged default (all-MiniLM-L6-v2, 384 wide, offline); or
                a local sentence-transformers folder, which states its pooling.
            trust_remote_code: run the Python code that the model's configuration names (``auto_map``), also of other
                repositories; off by default.
            dtype: of the weights; None: the configuration's, but not bfloat16 on a CPU that multiplies float32 faster.

        Raises:
            FileNotFoundError: the packaged encoder is not installed.
            OSError: the encoder is neither a local folder nor available from the hub.
            ValueError: ``config`` is a name without a known pooling, or of another kind of encoder; the encoder has Python
                code, without ``trust_remote_code``; its files lack weights, or, in a local folder, contain an adapter, which
                transformers would apply.
        """
        if isinstance(config, (str, Path)):
            if str(config) == MINILM.name:
                config = MINILM
            elif (Path(config) / "modules.json").is_file():
                config = EncoderConfig.from_sentence_transformers(config)
            else:
                raise ValueError(
                    "config: expected 'minilm', a local sentence-transformers folder or an EncoderConfig (it states the "
                    f"pooling), got {short_repr(str(config))}"
                )
        if not isinstance(config, EncoderConfig):
            raise ValueError(f"config: expected an EncoderConfig, got {type(config).__name__}, which has a class of its own")
        model, tokenizer = load(config, dtype, device, trust_remote_code)
        return cls(model, tokenizer, config)

    @property
    def embed_dim(self) -> int:
        """Width of ``task_emb``."""
        return self.model.config.get_text_config().hidden_size

    def weights(self) -> dict[str, Tensor]:
        """All tensors that embeddings depend on, by name."""
        return dict(self.model.state_dict())

    def prepare(self, texts: Sequence[str], examples: WorkedExamples = None) -> list[str]:
        """The texts as they are tokenized; raises ValueError as :meth:`encode`."""
        check_list(texts)
        refuse_examples(self.config.name, examples)
        prepared = []
        for i, text in enumerate(texts):
            check_text(f"texts[{i}]", text, "description")
            if self.config.template is not None:
                prepared.append(self.config.template.replace("{text}", text.strip()))
            else:
                prepared.append(normalise_description(text, self.config.full_stop))
        return prepared

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 32, *, examples: WorkedExamples = None) -> Tensor:
        """``task_emb [len(texts), embed_dim]`` float32 on the encoder's device.

        A text of more than ``max_length`` tokens is truncated at its end (special tokens stay), with a warning.

        Args:
            examples: none; a :class:`DocumentEncoder` reads them.

        Raises:
            ValueError: an empty list, an empty text or anything but strings; examples for an encoder that reads none;
                another ``batch_size`` than 1 or more.
            RuntimeError: adapters are in use on the model, which would change the embeddings.
        """
        prepared = self.prepare(texts, examples)
        if not prepared:
            raise ValueError("texts: expected at least one description, got none")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected an int of at least 1, got {short_repr(batch_size)}")
        found = self._cached(prepared)
        new: dict[str, int] = {}
        for i, text in enumerate(prepared):
            if text not in found:
                new.setdefault(text, i)
        tokens = self._tokenize(new, texts)
        order = sorted(tokens, key=lambda text: len(tokens[text]["input_ids"]))
        device = next(self.model.parameters()).device
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            with without_autocast(device):  # embeddings are kept, for callers without
                vectors = self._embed([tokens[text] for text in chosen])
            found |= zip(chosen, vectors, strict=True)
        if new and not self._modules.training:  # with dropout they are no two times the same
            self._keep(new, found)
        return torch.stack([found[text].to(device) for text in prepared])  # the model may have moved since

    def _cached(self, texts: Iterable[str]) -> dict[str, Tensor]:
        """The embeddings of those of ``texts`` that are in the cache; they become the most recently used ones."""
        found = {}
        with self._cache_lock:
            for text in texts:
                if text in self._cache:
                    self._cache.move_to_end(text)
                    found[text] = self._cache[text]
        return found

    def _keep(self, texts: Iterable[str], found: dict[str, Tensor]) -> None:
        """Put the embeddings of ``texts`` into the cache and drop those beyond its size."""
        with self._cache_lock:
            for text in texts:
                self._cache[text] = found[text].clone()  # a view would keep its whole batch in memory
                if len(self._cache) > self._cache_size:
                    self._cache.popitem(last=False)

    def _tokenize(self, new: dict[str, int], texts: Sequence[str]) -> dict[str, dict[str, list[int]]]:
        """Text -> the model's inputs, for the texts of ``new`` (text -> index in ``texts``); long ones are truncated."""
        if not new:
            return {}
        batch = self.tokenizer(list(new), return_special_tokens_mask=True, return_attention_mask=False, verbose=False)
        special = batch.pop("special_tokens_mask")
        tokens = {}
        for row, (text, index) in enumerate(new.items()):
            inputs = {key: batch[key][row] for key in batch}
            length, limit = len(special[row]), self.max_length
            if length > limit:
                warnings.warn(
                    f"texts[{index}]: description of {length} tokens truncated to {limit}, its end is cut: "
                    f"{short_repr(texts[index])}",
                    stacklevel=4,
                )
                # Not by the tokenizer, which would follow its truncation_side.
                closing = special[row][::-1].index(0)
                inputs = {key: ids[: limit - closing] + ids[length - closing :] for key, ids in inputs.items()}
            tokens[text] = inputs
        return tokens

    def _embed(self, tokens: list[dict[str, list[int]]]) -> Tensor:
        self._modules = self._modules.current(self.model)
        self._modules.refuse_adapters(self.config.name)
        bert = self._modules.bert
        hidden = bert.hidden_states(tokens) if bert and bert.computes() else self._hidden_states(tokens)
        texts = hidden.float().split([len(inputs["input_ids"]) for inputs in tokens])
        pool = {"cls": lambda text: text[0], "last": lambda text: text[-1], "mean": lambda text: text.mean(dim=0)}
        pooled = torch.stack([pool[self.config.pooling](text) for text in texts])
        return nn.functional.normalize(pooled, dim=-1) * math.sqrt(pooled.shape[-1])

    def _hidden_states(self, tokens: list[dict[str, list[int]]]) -> Tensor:
        """Last hidden states ``[total tokens, width]`` by the model's forward, of the texts one after another."""
        device = next(self.model.parameters()).device
        # Not by the tokenizer: a causal LM's pads on the left and may have no padding token.
        values = dict.fromkeys(tokens[0], 0) | {"input_ids": self.tokenizer.pad_token_id or 0}
        padded = {key: pad([torch.tensor(of[key]) for of in tokens], value) for key, value in values.items()}
        batch, (_, mask) = {key: rows.to(device) for key, (rows, _) in padded.items()}, padded["input_ids"]
        hidden = self.model(**batch, attention_mask=mask.to(device).long()).last_hidden_state
        return hidden[mask.to(hidden.device)]  # the last layer of a model on several devices


def pad(ids: Sequence[Tensor], value: int = 0) -> tuple[Tensor, Tensor]:
    """``[N, L]``, padded with ``value``, and the mask ``[N, L]`` of the tokens of texts ``[tokens]``."""
    padded = nn.utils.rnn.pad_sequence(list(ids), batch_first=True, padding_value=value)
    return padded, torch.arange(padded.shape[1]) < torch.tensor([len(text) for text in ids])[:, None]


class OneHotEncoder:
    """Names of training tasks to unit vectors (not scaled), for hypernetworks trained without text.

    Source: ``use_one_hot_task_emb`` of SakanaAI's code.

    >>> import t2l_engine as t2l
    >>> t2l.OneHotEncoder(t2l.OneHotConfig(("antonyms", "sentiment"))).encode(["sentiment"])  # [N, number of tasks]
    tensor([[0., 1.]])
    """

    max_examples = 0  # of a text, as of a TextEncoder

    def __init__(self, config: OneHotConfig, device: str | torch.device = "cpu"):
        """``device``: of the vectors."""
        self.config, self.device = config, device
        self._index = {name: i for i, name in enumerate(config.tasks)}

    @property
    def embed_dim(self) -> int:
        """Width of ``task_emb``: the number of training tasks."""
        return len(self.config.tasks)

    def weights(self) -> dict[str, Tensor]:
        """None: embeddings depend on the configuration alone."""
        return {}

    def prepare(self, texts: Sequence[str], examples: WorkedExamples = None) -> list[str]:
        """The names unchanged; ValueError for anything but names of training tasks, and for examples."""
        check_list(texts)
        refuse_examples(self.config.name, examples)
        for i, name in enumerate(texts):
            if not isinstance(name, str) or name not in self._index:
                some = list(self.config.tasks[:5])
                raise ValueError(
                    f"texts[{i}]: a hypernetwork with one-hot task embeddings knows only the names of its {self.embed_dim} "
                    f"training tasks, such as {short_repr(some)}; got {short_repr(name)}"
                )
        return list(texts)

    def encode(self, texts: Sequence[str], *, examples: WorkedExamples = None) -> Tensor:
        """``task_emb [len(texts), embed_dim]`` float32, row i the unit vector of the task named ``texts[i]``.

        Raises ValueError for an empty list and as :meth:`prepare`.
        """
        if not self.prepare(texts, examples):
            raise ValueError("texts: expected at least one task name, got none")
        rows = torch.tensor([self._index[name] for name in texts], device=self.device)
        return nn.functional.one_hot(rows, self.embed_dim).float()


# --- loading -------------------------------------------------------------------------------------------------------


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def load(
    config: EncoderConfig | DocumentEncoderConfig,
    dtype: torch.dtype | None,
    device: str | torch.device,
    trust_remote_code: bool,
    *,
    needs_tokenizer: bool = True,
) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer of a packaged encoder, local folder or hub name; raises as :meth:`TextEncoder.from_pretrained`.

    Python code beside them runs with ``trust_remote_code`` only.  ``needs_tokenizer``: whether a folder without one is
    refused; otherwise its tokenizer is None.
    """
    from transformers import AutoModel, AutoTokenizer, PreTrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    source = resolve(config.name)
    no_adapter(source, f"encoder {source!r}")
    try:
        # Both files are only parsed here: code is refused before transformers could run it, or use another class instead.
        values, _ = PreTrainedConfig.get_config_dict(source)
        if not values:
            raise OSError("no config.json")
        if not trust_remote_code and ("auto_map" in values or "auto_map" in get_tokenizer_config(source)):
            raise ValueError(
                f"encoder {source!r}: brings Python code of its own (auto_map in its configuration), which runs only with "
                "trust_remote_code=True (--trust-remote-code, which t2l train has not); read the code first"
            )
        if values.get("is_encoder_decoder"):
            raise ValueError(f"encoder {source!r}: expected an encoder or a decoder, got an encoder-decoder model")
        folder, tokenizer = Path(source), None
        if needs_tokenizer or not folder.is_dir() or any((folder / file).is_file() for file in TOKENIZER_FILES):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model, info = AutoModel.from_pretrained(
            source, dtype=dtype or dtypes.of(config, device), trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except OSError as error:
        reason = str(error).partition("\n")[0][:300]
        raise OSError(
            f"encoder {source!r}: cannot be loaded ({reason}); pass encoder=FOLDER (--encoder FOLDER) or a configuration of "
            "a local folder"
        ) from error
    # We pool the last hidden state, so a missing pooler, which transformers initialises at random, does not matter.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ValueError(f"encoder {source!r}: its weights lack {short_repr(missing)}")
    return model.to(device), tokenizer


def positions(model: PreTrainedModel) -> int | None:
    """Number of positions of ``model`` in tokens, None if it states no limit."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1  # RoBERTa and its relatives count from padding_idx + 1
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else None
