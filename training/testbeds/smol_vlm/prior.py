"""Accuracy on smol-vlm's data without looking at images: `python -m kvcapsule.training.testbeds.smol_vlm.prior`."""

from collections.abc import Iterable

from kvcapsule.errors import PackageError
from kvcapsule.testbeds import easy_vqa, emoji, words
from kvcapsule.testbeds.picture import Picture, prior_accuracy

TRAINING, TEST = 2_000, 500
"""Number of training and test pictures of emoji and words; of easy-VQA, all pictures are used."""


def questions(pictures: Iterable[Picture]) -> list[dict[str, str]]:
    """All questions as rows with prompt, answer and task."""
    return [{"prompt": q.prompt, "answer": q.answer, "task": q.task} for p in pictures for q in p.questions]


def main() -> None:
    """Print the accuracy of each question's most frequent answer, by data set and task."""
    print("most frequent answer of the training split to the same question, on all questions of test pictures")
    for name, draw in (("emoji", emoji.scene), ("words", words.sign)):
        train, test = (
            questions(draw(split, i) for i in range(n)) for split, n in (("train", TRAINING), ("test", TEST))
        )
        _report(name, train, test)
    _report("easy-vqa", questions(easy_vqa.shapes("train")), questions(easy_vqa.shapes("test")))


def _report(name: str, train: list[dict[str, str]], test: list[dict[str, str]]) -> None:
    for task, accuracy in sorted(prior_accuracy(train, test).items()):
        print(f"{name:9} {task:7} {accuracy:.3f}  ({sum(row['task'] == task for row in test)} questions)")


if __name__ == "__main__":
    try:
        main()
    except PackageError as error:
        raise SystemExit(str(error)) from error
