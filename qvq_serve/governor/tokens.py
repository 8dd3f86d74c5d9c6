"""What the governor must know of a vocabulary: scripts, characters cut in two, line ends, and the words it writes.

For byte-level tokenizers, as Qwen's: a token's spelling has one character for each of its bytes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qvq_serve.governor.detect import word
from qvq_serve.governor.policy import SCRIPTS, STRAY
from qvq_serve.hooks.language import script
from qvq_serve.hooks.markers import COLONS, MARKERS

CONCLUSION = ("**", "Final", " Answer", "**", "\n\n")
"""Written piece by piece, on its own line. The tokenizer joins the last two: that tells it from the model's own."""
PHRASES = ("\n\nLet me look at the image again. ", "\n\n让我再看一下图片。")
"""A look-back, in English and in Chinese."""
IMAGE = frozenset(["image", "images", "picture", "figure", "photo", "diagram", "chart", "graph"]) | {
    "图",
    "图片",
    "图像",
    "图表",
    "照片",
}
"""Words that mention the image."""
CIRCLING = frozenset(["wait", "alternatively", "hmm", "等等", "另外", "或者", "嗯", "不对"])
"""Words that open another round (NoWait, arXiv 2506.08343), as far as each is one token."""
BYTE = {character: byte for byte, character in bytes_to_unicode().items()}
# What a character may turn out to be, by its first byte, where a token has no more of it.
FIRST_BYTES = (
    (range(0xD0, 0xD4), "Cyrillic"), (range(0xD6, 0xD8), "Hebrew"), (range(0xD8, 0xDC), "Arabic"),
    (range(0xE4, 0xEA), "Han"), (range(0xEA, 0xEE), "Hangul"),
)  # fmt: skip


@dataclass
class Vocabulary:
    """Tables over token ids, (V,) each, on the CPU; ids beyond the tokenizer's are neutral."""

    scripts: Tensor
    """int16: the scripts of its letters as bits, policy.SCRIPTS, and policy.STRAY."""
    opens: Tensor
    """int8: bytes that a character begun in it lacks at its end; -1 where none begins or ends in it."""
    closes: Tensor
    """int8: its bytes, where all of them go on with a character begun before; else 0."""
    words: Tensor
    """int8: letters or digits alone, by detect.word."""
    ends_step: Tensor
    """bool: it ends a line."""
    mentions: Tensor
    """bool: it mentions the image."""
    circling: Tensor
    """(C,) int64: the tokens that open another round."""


def spelled(tokenizer: Any, size: int) -> list[bytes]:
    """The bytes of each token; none for special ones and beyond the vocabulary."""
    special, found = set(tokenizer.all_special_ids), []
    for token, spelling in enumerate(tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))):
        known = spelling is not None and token not in special and all(character in BYTE for character in spelling)
        found.append(bytes(BYTE[character] for character in spelling) if known else b"")
    return found + [b""] * (size - len(found))


def needed(byte: int) -> int:
    """Bytes that follow a first byte of UTF-8; -1 for one that goes on."""
    return -1 if byte >> 6 == 2 else 3 if byte >= 0xF0 else 2 if byte >= 0xE0 else 1 if byte >= 0xC0 else 0


def left_open(spelling: bytes) -> tuple[int, int]:
    """(bytes that the last character lacks, or -1 where none begins, and where it begins)."""
    begins = next((at for at in range(len(spelling) - 1, -1, -1) if needed(spelling[at]) >= 0), -1)
    if begins < 0:
        return (-1, 0) if spelling else (0, 0)
    return max(needed(spelling[begins]) - (len(spelling) - begins - 1), 0), begins


def letters(spelling: bytes) -> int:
    """The scripts of a token's letters as bits, of a cut character by its first byte where that tells, and STRAY."""
    opens, begins = left_open(spelling)
    whole = spelling[:begins] if opens > 0 else spelling
    bits = STRAY if spelling and needed(spelling[0]) < 0 else 0
    for character in whole.decode("utf-8", "ignore"):
        if (name := script(character)) and name != "Greek":
            bits |= 1 << SCRIPTS.index(name if name in SCRIPTS else "Other")
    if opens > 0:
        bits |= sum(1 << SCRIPTS.index(name) for group, name in FIRST_BYTES if spelling[begins] in group)
    return bits


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """The tables of a byte-level tokenizer for `size` logits; 0.5 s for Qwen's 152,064."""
    spelling = spelled(tokenizer, size)
    opens = [left_open(each)[0] for each in spelling]
    texts = [each.decode("utf-8", "replace").strip() for each in spelling]
    return Vocabulary(
        scripts=torch.tensor([letters(each) for each in spelling], dtype=torch.int16),
        opens=torch.tensor(opens, dtype=torch.int8),
        closes=torch.tensor([len(each) if more < 0 else 0 for each, more in zip(spelling, opens, strict=True)],
                            dtype=torch.int8),
        words=torch.tensor([word(text) for text in texts], dtype=torch.int8),
        ends_step=torch.tensor([b"\n" in each for each in spelling]),
        mentions=torch.tensor([text.lower() in IMAGE for text in texts]),
        circling=torch.tensor([at for at, text in enumerate(texts) if text.lower() in CIRCLING], dtype=torch.int64),
    )  # fmt: skip


def conclusion_tokens(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(line ends before it, the conclusion) as the tokenizer would never write it, to be told from the model's own."""
    lead = tuple(encoded(tokenizer, "\n\n"))
    pieces = [ids for piece in CONCLUSION for ids in encoded(tokenizer, piece)]
    if pieces == encoded(tokenizer, "".join(CONCLUSION)):  # bytes alone: a space, which no model puts there, tells
        pieces = [ids for piece in (*CONCLUSION[:-1], " \n\n") for ids in encoded(tokenizer, piece)]
    return lead, tuple(pieces)


def natural_markers(tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """The markers by which a model concludes by itself, as the tokenizer writes them at a line's start and in one.

    It joins a marker with what stands before it, as in `\\]**Final Answer`, and a colon with what follows it.
    """
    whole = [*MARKERS, *(marker + "s" for marker in MARKERS if marker.endswith("nswer"))]
    whole += [marker + tail for marker in COLONS for tail in ("\n", "\n\n", '"', "“", "**", "$", "\\")]
    found = {tuple(encoded(tokenizer, lead + marker)) for marker in whole for lead in ("", *" ])*#")}
    return tuple(sorted(one for one in found if not any(one[at:] in found for at in range(1, len(one)))))


def marker_firsts(tokenizer: Any) -> tuple[int, ...]:
    """The first tokens of the markers that are no headings, which begin every step of some answers."""
    return tuple(sorted({encoded(tokenizer, marker)[0] for marker in MARKERS if not marker.startswith("#")}))


def encoded(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens."""
    found: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return found
