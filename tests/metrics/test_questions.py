import math
from functools import partial

import pytest
import torch

from dpdmd_pipeline.metrics.measures import PartScores
from dpdmd_pipeline.metrics.questions import (
    VisionLanguage,
    part_answers,
    part_questions,
    rated_quality,
    rating,
    vqa_score,
)
from dpdmd_pipeline.scoring.sets import Loaded
from dpdmd_pipeline.scoring.workers import measure_set


class OpenSet:
    """Open pictures of one prompt."""

    no_text = ""

    def __init__(self, text, photos):
        self.id = self.text = text
        self.photos = photos

    def __len__(self):
        return len(self.photos)

    def load(self):
        return Loaded([str(number) for number in range(len(self))], list(self.photos), [])


@pytest.fixture(scope="module")
def model(vision_language, passes):
    return VisionLanguage(vision_language, passes)


def test_the_vqa_score_is_the_probability_of_yes_after_the_question(model, photos):
    scores = vqa_score(model, "a red circle", photos[:2])
    question = 'Does this figure show "a red circle"? Please answer yes or no.'
    processor = model.processor
    for photo, value in zip(photos, scores, strict=False):
        chat = [{"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": question}]}]
        options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template(chat, **options)
        with torch.no_grad():
            logits = model.model(**inputs).logits[0, -1]
        torch.testing.assert_close(value, logits.softmax(-1)[processor.tokenizer.convert_tokens_to_ids("Yes")])


def test_greedy_answers_repeat(model, photos):
    answers = {model.answer("What is it?", photos[0], 8) for _ in range(3)}
    assert len(answers) == 1


def test_an_answer_without_a_rating_is_nan(model, photos, monkeypatch):
    monkeypatch.setattr("dpdmd_pipeline.metrics.questions._RATING_TOKENS", 4)
    assert rated_quality(model, "", photos[:2]).isnan().all()  # a random model answers nonsense


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<think>sharp: 4</think><answer>4.25</answer>", 4.25),
        ("<answer>1</answer> or <answer> 3.5\n</answer>", 3.5),
        ("4.25", math.nan),
        ("<answer>good</answer>", math.nan),
        ("<answer>7</answer>", math.nan),
        ("<answer>3 of 5</answer>", math.nan),
        ("<answer>4.2", math.nan),
    ],
)
def test_only_a_number_from_1_to_5_between_the_tags_counts(answer, expected):
    value = rating(answer)
    assert value == expected or math.isnan(value) and math.isnan(expected)


def test_every_part_of_a_prompt_has_its_questions():
    record = {
        "include": [
            {"class": "bench", "count": 1},
            {"class": "dog", "count": 1, "color": "red", "position": ["right of", 0]},
            {"class": "cat", "count": 3},
        ],
        "exclude": [{"class": "cat", "count": 4}],
    }
    questions = part_questions(record)
    assert [answer for _, answer in questions] == ["Yes"] * 5 + ["No"]
    assert [question.split(" Please")[0] for question, _ in questions] == [
        "Is there a bench in this picture?",
        "Is there a dog in this picture?",
        "Is the dog in this picture red?",
        "Is the dog to the right of the bench in this picture?",
        "Are there at least 3 cats in this picture?",
        "Are there at least 4 cats in this picture?",
    ]


@pytest.mark.parametrize(
    ("record", "part"),
    [
        ({"tag": "empty"}, "include .*exclude"),
        ({"include": [{"class": "dog"}]}, r"^include\.0\.count: "),
        ({"exclude": [{"count": 1}]}, r"^exclude\.0\.class: "),
        ({"include": [{"class": "dog", "count": 0}]}, r"^include\.0\.count: .*\b0\b"),
        ({"include": [{"class": "dog", "count": 1, "position": ["above"]}]}, r"^include\.0\.position"),
        ({"include": [{"class": "dog", "count": 1, "position": ["above", 1]}]}, r"position .*dog .*\b1\b.*\b1\b"),
        ({"include": "dog"}, "^include: "),
    ],
)
def test_an_invalid_record_of_parts_is_refused(record, part):
    with pytest.raises(ValueError, match=part):
        part_questions(record)


def test_parts_are_scored_by_the_probability_of_the_right_answer(model, photos):
    record = {"include": [{"class": "cat", "count": 1}], "exclude": [{"class": "cat", "count": 2}]}
    scores = part_answers(model, {"a cat": record}, "a cat", photos[:2])
    (first, _), (second, _) = part_questions(record)
    assert torch.equal(scores[:, 0], model.probability("Yes", first, photos[:2]))
    assert torch.equal(scores[:, 1], model.probability("No", second, photos[:2]))


def test_a_prompt_without_valid_parts_costs_no_other_prompt(model, photos):
    record = {"include": [{"class": "cat", "count": 1}]}
    records = {"a cat": record, "a cow": {"include": [{"class": "cow"}]}}
    measure = PartScores(partial(part_answers, model, records))
    rows = [measure_set(measure, OpenSet(text, photos[:2])) for text in ("a cat", "a dog", "a cow")]
    assert [bool(row.measured.values) for row in rows] == [True, False, False]
    assert rows[1].unfit and "include.0.count" in rows[2].unfit
