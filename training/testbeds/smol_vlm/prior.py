"""What one would score on smol-vlm's data who never looks: `python -m kvcapsule.training.testbeds.smol_vlm.prior`."""

from collections.abc import Iterable

from kvcapsule.errors import PackageError
from kvcapsule.testbeds import easy_vqa, emoji, words
from kvcapsule.testbeds.picture import Picture, prior_accuracy

TRAINING, TEST = 2_000, 500
"""Pictures of emoji and of words that the answers' frequencies are counted on, and that are asked about; of easy-VQA,
all."""


def questions(pictures: Iterable[Picture]) -> list[dict[str, str]]:
    """All questions as rows with prompt, answer and task."""
    return [{"prompt": q.prompt, "answer": q.answer, "task": q.task} for p in pictures for q in p.questions]


def main() -> None:
    """Print, by data set and task, the accuracy of the most frequent answer to each question."""
    print("most frequent answer of the training split to the same question, on all questions of test pictures")
    for name, draw in (("emoji", emoji.scene), ("words", words.sign)):
        known, asked = (
            questions(draw(split, i) for i in range(n)) for split, n in (("train", TRAINING), ("test", TEST))
        )
        _report(name, known, asked)
    _report("easy-vqa", questions(easy_vqa.shapes("train")), questions(easy_vqa.shapes("test")))


def _report(name: str, known: list[dict[str, str]], asked: list[dict[str, str]]) -> None:
    for task, accuracy in sorted(prior_accuracy(known, asked).items()):
        print(f"{name:9} {task:7} {accuracy:.3f}  ({sum(row['task'] == task for row in asked)} questions)")


if __name__ == "__main__":
    try:
        main()
    except PackageError as error:
        raise SystemExit(str(error)) from error
