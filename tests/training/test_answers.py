"""Where the answer begins: by the template's own marks, or behind the opened prompt, or not at all."""

import copy

import pytest
import torch

from kvcapsule.data.source import SourceConfig, load
from kvcapsule.errors import DataError
from kvcapsule.training.answers import longest_sequence, marks_answers
from kvcapsule.training.datamodule import Questions


@pytest.fixture
def collate(processor):
    """Batches of three questions under a template, with the texts of the targets."""
    rows = load(SourceConfig(source="pages", size=3))

    def of(template: str, longest: int | None = None):
        changed = copy.deepcopy(processor)
        changed.chat_template = template
        batch = (
            Questions(rows, rows, changed, batch=3)
            .served(longest=longest)
            .collate([{**rows[i], "index": i} for i in range(3)])
        )
        ids = batch.inputs["input_ids"]
        shown = [changed.decode(row[-int(n) :]) for row, n in zip(ids, batch.answers, strict=True)]
        return batch, shown, rows["answer"]

    return of


def test_it_begins_behind_the_opened_prompt(processor, collate) -> None:
    _, shown, answers = collate(processor.chat_template)
    assert not marks_answers(processor)
    for text, answer in zip(shown, answers, strict=True):
        assert text.startswith(answer)


def turns(opened: str, answered: str) -> str:
    """A template whose opened and answered turns begin as given."""
    return (
        "{% for m in messages %}{% if m.role == 'user' %}{% for c in m.content %}{% if c.type == 'image' %}<image>"
        "{% else %}{{ c.text }}{% endif %}{% endfor %}{% else %}"
        + answered.replace("ANSWER", "{{ m.content[0].text }}")
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + opened
        + "{% endif %}"
    )


def test_a_template_that_opens_another_turn_than_it_writes_is_refused(collate) -> None:
    """A thinking block that answered turns lack: a difference of lengths would take a part of the answer away."""
    with pytest.raises(DataError, match="row 0: the chat template opens an answer with other tokens"):
        collate(turns("\nthink: ", "\nANSWER"))


def test_a_prompt_longer_than_the_answered_turn_is_refused(collate) -> None:
    with pytest.raises(DataError, match="row 0: the chat template opens"):
        collate(turns("\nthink about it for as long as it takes, then write the answer down here: " * 9, "ANSWER"))


def test_marks_of_the_template_decide(collate) -> None:
    """They work where the opened prompt is no prefix, and behind an image that becomes many tokens."""
    template = turns("\nthink: ", "\n{% generation %}ANSWER{% endgeneration %}")
    batch, shown, answers = collate(template)
    assert shown == list(answers)
    assert "assistant_masks" not in batch.inputs and (batch.answers > 0).all()


def test_marks_and_the_opened_prompt_agree(collate) -> None:
    plain, marked = (
        collate(turns("\n", f"\n{before}ANSWER{after}"))[0]
        for before, after in (("", ""), ("{% generation %}", "{% endgeneration %}"))
    )
    assert torch.equal(plain.answers, marked.answers)
    assert torch.equal(plain.inputs["input_ids"], marked.inputs["input_ids"])


def test_a_row_longer_than_the_model_reads_is_refused(processor, model, collate) -> None:
    with pytest.raises(DataError, match=r"row 0: prompt and answer are \d+ tokens, and the model reads 200 at most"):
        collate(processor.chat_template, longest=200)
    assert longest_sequence(model.config) == model.config.get_text_config().max_position_embeddings
