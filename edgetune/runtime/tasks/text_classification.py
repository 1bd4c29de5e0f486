"""Text classification and regression on the device: a string -> token ids -> a label or value."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from edgetune.errors import ConfigError, DataError, IntegrityError, MissingExtraError
from edgetune.runtime.bundle import TOKENIZER_NAME, Bundle
from edgetune.runtime.records import from_mapping
from edgetune.runtime.tasks.answers import Answers, split_options
from edgetune.runtime.tasks.classification import Classes

MAX_TOKENS = 2**20


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """The manifest's options: longest sequence in tokens, the id that pads."""

    max_length: int
    pad_id: int


class TextClassification:
    """Encodes strings with the bundle's own tokenizer.json; `answers` says what comes of them."""

    def __init__(self, bundle: Bundle, answers: type[Answers] = Classes) -> None:
        """Load the tokenizer; see `open_tokenizer` for the errors."""
        theirs, own = split_options(bundle.manifest, answers)
        self._answers = answers(bundle.manifest, theirs)
        self.options = from_mapping(
            TextOptions, own, where="manifest: options", error=IntegrityError
        )
        if not 1 <= self.options.max_length <= MAX_TOKENS or not 0 <= self.options.pad_id < 2**31:
            raise IntegrityError(f"manifest: options: out of bounds: {self.options}")
        self._tokenizer = open_tokenizer(
            bundle.read(TOKENIZER_NAME),
            self.options.max_length,
            where=str(bundle.where / TOKENIZER_NAME),
        )

    def is_many(self, value: Any) -> bool:
        """Say whether `value` is a list of strings rather than one."""
        return isinstance(value, list | tuple)

    def golden(self, array: Any, where: str) -> str:
        """Return the text in a 0-d array of str.

        Raises:
            IntegrityError: it is another array.
        """
        if array.ndim or array.dtype.kind != "U":
            found = f"{array.dtype!s:.80} {array.shape}"
            raise IntegrityError(f"{where}: expected a string, got an array of {found}")
        return str(array.item())

    def encode(self, sample: Any) -> dict[str, Any]:
        """Return token ids and mask, int64, shape (tokens,).

        Raises:
            DataError: `sample` is no string, or one that is no Unicode text.
            IntegrityError: the bundle's tokenizer fails on it.
        """
        if not isinstance(sample, str):
            raise DataError(f"expected a string, got {type(sample).__name__}")
        try:
            sample.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{sample!r:.80}: is no Unicode text: {error.reason}") from error
        try:
            ids = np.array(self._tokenizer.encode(sample).ids, np.int64)
        except BaseException as error:
            raise_of_tokenizers(error, f"the bundle's tokenizer fails on {sample!r:.80}")
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    def group(self, encoded: dict[str, Any]) -> Hashable:
        """Batch texts of like length, so that little is spent on padding."""
        return -(-len(encoded["input_ids"]) // 16)

    def stack(self, encoded: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Pad to the longest: int64, shape (batch, tokens)."""
        # a tokenizer may give no token at all for ""; an axis of length 0 breaks graphs
        width = max(1, *(e["input_ids"].shape[0] for e in encoded))
        ids = np.full((len(encoded), width), self.options.pad_id, np.int64)
        mask = np.zeros((len(encoded), width), np.int64)
        for row, sample in enumerate(encoded):
            length = sample["input_ids"].shape[0]
            ids[row, :length] = sample["input_ids"]
            mask[row, :length] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def results(
        self,
        outputs: dict[str, Any],
        labels: Sequence[str],
        *,
        all_scores: bool,
        learned: bool = False,
    ) -> list[Any]:
        """Return one result a sample: `Classification`, `MultiLabel` or `Value`."""
        return self._answers.results(outputs, labels, all_scores=all_scores, learned=learned)


def open_tokenizer(data: bytes, max_length: int, *, where: str) -> Any:
    """Return a `tokenizers.Tokenizer` that truncates to `max_length` and does not pad.

    Args:
        data: the bytes of tokenizer.json.
        max_length: longest sequence, in tokens.
        where: what is being read, for messages.

    Raises:
        MissingExtraError: the package tokenizers is not installed.
        ConfigError: it is, and cannot be imported.
        IntegrityError: the bytes are no tokenizer.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise MissingExtraError("tokenizers", "text") from error
    except ImportError as error:
        raise ConfigError(f"tokenizers is there but cannot be imported: {error}") from error
    try:
        tokenizer = Tokenizer.from_buffer(data)
        tokenizer.enable_truncation(max_length)
        tokenizer.no_padding()
    except BaseException as error:
        raise_of_tokenizers(error, f"{where}: is no tokenizer")
    return tokenizer


def raise_of_tokenizers(error: BaseException, what: str) -> NoReturn:
    """Raise `IntegrityError` for an error of tokenizers, and any other as it is.

    tokenizers raises bare Exception; a panic of its Rust comes as a BaseException.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    raise IntegrityError(f"{what}: {' '.join(str(error).split()):.200}") from error
