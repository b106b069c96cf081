"""Blind votes: sides, order, the file, and what they say."""

import json
import resource

import pytest

from imagen_lightning.errors import InputError
from imagen_lightning.evaluation.votes import Ballot, Vote, left_is_a, order, preferences

NUM = 200


def test_order_and_sides_are_random_and_the_seed_s():
    assert sorted(order(NUM, 1)) == list(range(NUM))
    assert order(NUM, 1) == order(NUM, 1) != order(NUM, 2)
    assert order(NUM, 1) != list(range(NUM))
    assert 70 < sum(left_is_a(NUM, 1)) < 130
    assert left_is_a(NUM, 1) != left_is_a(NUM, 2)


def test_a_side_s_vote_goes_to_the_cascade_shown_there(tmp_path):
    ballot = Ballot(tmp_path / "votes.jsonl", NUM, 0)
    for prompt, a_is_left in enumerate(left_is_a(NUM, 0)):
        assert ballot.shown(prompt, "left") == ("a" if a_is_left else "b")
        assert {ballot.shown(prompt, side) for side in ("left", "right")} == {"a", "b"}
        ballot.cast(prompt, "fidelity", "left")
        assert ballot.votes[prompt, "fidelity"].choice == ("a" if a_is_left else "b")
    assert not ballot.is_done(0)
    ballot.cast(0, "alignment", "tie")
    assert ballot.is_done(0)


def test_votes_are_on_disk_as_they_fall_and_the_last_counts(tmp_path):
    path = tmp_path / "votes.jsonl"
    ballot = Ballot(path, 3, 0)
    for side in ("left", "right"):
        ballot.cast(1, "fidelity", side)
        assert json.loads(path.read_text().splitlines()[-1])["choice"] == ballot.shown(1, side)
    again = Ballot(path, 3, 0)
    assert again.votes == ballot.votes == {(1, "fidelity"): Vote(1, "fidelity", ballot.shown(1, "right"))}


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "votes.jsonl"
    Ballot(path, 3, 0).cast(1, "fidelity", "tie")
    whole = path.read_text()
    path.write_text(whole + '{"prompt": 2, "ques')
    ballot = Ballot(path, 3, 0)
    assert list(ballot.votes) == [(1, "fidelity")]
    ballot.cast(2, "alignment", "tie")
    assert len(Ballot(path, 3, 0).votes) == 2


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": 1, "question": "fidelity", "choice": "c"}',
        '{"prompt": true, "question": "fidelity", "choice": "a"}',
        '{"prompt": 1, "question": ["fidelity"], "choice": "a"}',
        '{"prompt": [1], "question": "fidelity", "choice": "a"}',
        '{"prompt": 9, "question": "fidelity", "choice": "a"}',
        "[" * 100_000,
        "\0",
        "[]",
    ],
)
def test_a_line_that_is_not_a_vote_is_named(line, tmp_path):
    path = tmp_path / "votes.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match="line 1, is not a vote"):
        Ballot(path, 3, 0)


def test_a_vote_that_finds_no_room_leaves_nothing(tmp_path):
    path = tmp_path / "votes.jsonl"
    ballot = Ballot(path, 3, 0)
    ballot.cast(1, "fidelity", "tie")
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(OSError):
            ballot.cast(2, "fidelity", "tie")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(ballot.votes) == [(1, "fidelity")]
    ballot.cast(2, "fidelity", "left")
    assert Ballot(path, 3, 0).votes == ballot.votes


@pytest.mark.parametrize(
    "vote", [(3, "fidelity", "left"), (-1, "fidelity", "left"), (0, "x", "left"), (0, "fidelity", "x")]
)
def test_votes_of_another_ballot_are_refused(tmp_path, vote):
    with pytest.raises(InputError, match="no vote of this ballot"):
        Ballot(tmp_path / "votes.jsonl", 3, 0).cast(*vote)
    assert not (tmp_path / "votes.jsonl").exists()


@pytest.mark.parametrize("line", ['{"prompt": 7, "question": "fidelity", "choice": "a"}', "[]", "x"])
def test_a_file_of_other_things_is_refused(tmp_path, line):
    (tmp_path / "votes.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match="line 1"):
        Ballot(tmp_path / "votes.jsonl", 3, 0)


def votes(a, b, tie, question="fidelity"):
    choices = ["a"] * a + ["b"] * b + ["tie"] * tie
    return [Vote(number, question, choice) for number, choice in enumerate(choices)]


def test_what_votes_say():
    (clear,) = preferences(votes(70, 20, 10))
    assert (clear.a, clear.b, clear.ties, clear.share_a) == (70, 20, 10, 0.75)
    # Wilson, p = 0.75, n = 100, z = 1.96: 0.6570 to 0.8245
    assert (clear.low, clear.high) == pytest.approx((0.6570, 0.8245), abs=1e-3)
    assert "A is preferred" in clear.sentence()
    assert "B is preferred" in preferences(votes(20, 70, 10))[0].sentence()
    assert preferences(votes(2, 0, 0))[0].sentence().endswith("which is preferred cannot be told from these answers")
    assert preferences(votes(200, 200, 0))[0].sentence().endswith(": no preference")
    assert preferences([]) == []


def test_by_question_and_category():
    cast = votes(4, 0, 0) + votes(0, 4, 0, "alignment")
    assert [(item.question, item.a, item.b) for item in preferences(cast)] == [("fidelity", 4, 0), ("alignment", 0, 4)]
    assert [item.a for item in preferences(cast, [0, 1])] == [2, 0]
