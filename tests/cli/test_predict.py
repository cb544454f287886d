from __future__ import annotations

import json
from pathlib import Path

import pytest

TEXTS = ["the rain is wind good", "the goal is ball good", "the soup is rice good"]


def lines(result) -> list[dict]:
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def from_arguments(cli, finished_run: Path) -> list[dict]:
    return lines(cli("predict", finished_run, *TEXTS))


def test_each_line_is_json_with_label_and_score(from_arguments):
    assert [line["text"] for line in from_arguments] == TEXTS
    for line in from_arguments:
        assert line["label"] in ("food", "sport", "weather")
        assert 1 / 3 <= line["score"] <= 1


def test_a_file_a_table_and_standard_input_give_the_same(cli, finished_run, from_arguments, tmp_path):
    text = "\n".join(TEXTS) + "\n"
    plain, table = tmp_path / "texts.txt", tmp_path / "texts.csv"
    plain.write_text(text)
    table.write_text("number,text\n" + "".join(f"{i},{line}\n" for i, line in enumerate(TEXTS)))
    for result in (
        cli("predict", finished_run, "--file", plain),
        cli("predict", finished_run, "--file", table),
        cli("predict", finished_run, stdin=text.replace("\n", "\r\n\n")),
    ):
        found = lines(result)
        assert [line["label"] for line in found] == [line["label"] for line in from_arguments]
        assert [line["score"] for line in found] == pytest.approx(
            [line["score"] for line in from_arguments], abs=1e-5
        )


def test_top_k_scores_are_sorted_and_hold_the_label(cli, finished_run):
    (line,) = lines(cli("predict", finished_run, TEXTS[0], "--top-k", "3"))
    scores = list(line["scores"].values())
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1, abs=1e-4)
    assert next(iter(line["scores"])) == line["label"]


def test_more_texts_than_a_chunk_keep_their_order(cli, finished_run, from_arguments):
    found = lines(cli("predict", finished_run, "--batch-size", "2", stdin="\n".join(TEXTS * 7)))
    assert [line["text"] for line in found] == TEXTS * 7
    assert [line["label"] for line in found] == [line["label"] for line in from_arguments] * 7


def test_no_control_characters_in_a_pipe(cli, finished_run):
    result = cli("predict", finished_run, TEXTS[0])
    assert "\x1b" not in result.stdout + result.stderr
    assert "\r" not in result.stdout
