"""Two texts word by word: which words are the same, and the word error rate.

Words are compared in small letters and without punctuation. They are aligned so that the fewest are
replaced, left out or put in (Levenshtein distance); of such alignments the one with most words the
same counts.
"""

import re
import unicodedata
from dataclasses import dataclass


@dataclass(frozen=True)
class Alignment:
    """Of a text with another: words in the first and in the second, how many are the same, and how
    many edits lead from one to the other.
    """

    first: int
    second: int
    same: int
    edits: int

    def __add__(self, other: "Alignment") -> "Alignment":
        return Alignment(
            *(
                getattr(self, name) + getattr(other, name)
                for name in ("first", "second", "same", "edits")
            )
        )

    @property
    def same_share(self) -> float | None:
        """Words that are the same, of the words of the longer text: what is put in counts against
        it as what is left out does. None without words.
        """
        longer = max(self.first, self.second)
        return self.same / longer if longer else None

    @property
    def error_rate(self) -> float | None:
        """Edits per word of the first text, the reference."""
        return self.edits / self.first if self.first else None


def words(text: str) -> list[str]:
    """In small letters, without punctuation; an apostrophe or a hyphen inside a word stays."""
    return re.findall(
        r"\w+(?:['’-]\w+)*", unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    )


def align(first: str, second: str) -> Alignment:
    a, b = words(first), words(second)
    # (edits, minus the words that are the same) to reach b[:j] from a[:i]
    best = [(j, 0) for j in range(len(b) + 1)]
    for i, word in enumerate(a, 1):
        row = [(i, 0)]
        for j, other in enumerate(b, 1):
            (up, up_same), (left, left_same), (corner, corner_same) = (
                best[j],
                row[j - 1],
                best[j - 1],
            )
            through = (corner, corner_same - 1) if word == other else (corner + 1, corner_same)
            row.append(min((up + 1, up_same), (left + 1, left_same), through))
        best = row
    edits, same = best[-1]
    return Alignment(len(a), len(b), -same, edits)
