"""How many questions are answered exactly right: what compression costs, in a figure that anyone understands."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from exporter.pepper.questions import Question


@dataclass
class Tally:
    """Right answers out of those asked."""

    asked: int = 0
    right: int = 0

    @property
    def rate(self) -> float:
        """The share of right answers, 0..1. Raises ZeroDivisionError when nothing was asked."""
        return self.right / self.asked

    def add(self, right: bool) -> None:
        self.asked += 1
        self.right += right

    def to_dict(self) -> dict[str, Any]:
        return {"asked": self.asked, "right": self.right, "rate": self.rate}


@dataclass(frozen=True)
class Miss:
    """A question and the wrong answer it got."""

    question: Question
    got: str


@dataclass
class Score:
    """Exact answers overall, by kind and by language, and every miss."""

    overall: Tally = field(default_factory=Tally)
    by_kind: dict[str, Tally] = field(default_factory=dict)
    by_language: dict[str, Tally] = field(default_factory=dict)
    misses: list[Miss] = field(default_factory=list)

    def add(self, question: Question, got: str) -> None:
        """Count one answer: right when it is the expected text, blanks around it aside."""
        right = got.strip() == question.answer
        self.overall.add(right)
        self.by_kind.setdefault(question.kind, Tally()).add(right)
        self.by_language.setdefault(question.language, Tally()).add(right)
        if not right:
            self.misses.append(Miss(question, got))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            **self.overall.to_dict(),
            "by_kind": {kind: tally.to_dict() for kind, tally in self.by_kind.items()},
            "by_language": {language: tally.to_dict() for language, tally in self.by_language.items()},
            "misses": [
                {"prompt": miss.question.prompt, "answer": miss.question.answer, "got": miss.got}
                for miss in self.misses
            ],
        }


def score(answer: Callable[[str], str], questions: Iterable[Question]) -> Score:
    """Ask each question; `answer` takes the prompt's text (no template applied) and gives the answer's text.

    >>> from exporter.pepper.questions import Question
    >>> score(lambda prompt: "4", [Question("What is 2 + 2?", "4", "add", "en")]).overall.rate
    1.0
    """
    result = Score()
    for question in questions:
        result.add(question, answer(question.prompt))
    return result
