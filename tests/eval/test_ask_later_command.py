"""`kvcapsule eval --protocol ask-later`: what it writes, shows and refuses."""

import json
from pathlib import Path

from support.suite_files import QUICK, evaluate, refused_line

from kvcapsule.eval.report import markdown
from kvcapsule.eval.report.rows import asked_later


def test_the_json_and_the_tables_of_both_protocols(vlm: str, tmp_path: Path, capsys) -> None:
    found = {}
    for protocol in ("ask-first", "ask-later"):
        file = tmp_path / f"{protocol}.json"
        words = ("--model", vlm, "--budget", "0.2", "--methods", "snapkv,evenly-spaced,int4", "--timing", "false")
        assert evaluate(*words, *QUICK, "--protocol", protocol, "--json", str(file)) == 0
        result, shown = json.loads(file.read_text()), capsys.readouterr().out
        found[protocol] = {row["method"]: row for row in result["rows"]}
        later = protocol == "ask-later"
        assert result["protocol"] == protocol and asked_later(result["rows"]) == later
        for text in ("asked later", "KL, first", "none to see here: snapkv."):
            assert (text in shown) == later, text
        written = markdown.table(result["rows"]) + " ".join(markdown.protocol_notes(result["rows"]))
        for text in ("KL of the first token", "--protocol ask-later", "none to see here: snapkv."):
            assert (text in written) == later, text
    first, later = found["ask-first"], found["ask-later"]
    assert all(row["first_token_kl"] == 0 for row in first.values())
    assert {name: row["first_token_kl"] > 0 for name, row in later.items()} == {
        "full": False,
        "snapkv": True,
        "evenly-spaced": True,
        "int4": True,
    }
    assert later["full"]["accuracy"] == first["full"]["accuracy"]
    # The question is no part of what is compressed.
    assert later["full"]["kv_bytes"] < first["full"]["kv_bytes"]
    assert {name for name, row in later.items() if row["reads_question"]} == {"snapkv"}


def test_a_result_of_an_earlier_version_was_asked_first() -> None:
    assert not asked_later([{"method": "full"}]) and asked_later([{"method": "a", "first_token_kl": None}])


def test_another_protocol_is_refused(capsys) -> None:
    line = refused_line(capsys, "--protocol", "later")
    assert "--protocol later is unknown: name one of ask-first, ask-later." in line
