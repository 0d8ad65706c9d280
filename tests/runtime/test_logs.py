"""Where records go: words or lines of JSON, on this program's own logger alone, and never with a traceback."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from fedvfm.runtime import logs
from fedvfm.trust import signed_documents

LOG = logging.getLogger("fedvfm.server.x")
PACKAGE = Path(logs.__file__).parents[1]


def test_a_record_is_a_line_of_json_with_its_text_or_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with logs.output(as_json=True, stream="stdout"):
        LOG.info("100 %s of\n'x'")
        LOG.warning("round", extra={"fields": {"event": "round", "round": 3}})
        LOG.debug("too little")
    said = capsys.readouterr()
    text, fields = map(json.loads, said.out.splitlines())
    assert said.err == ""
    assert list(text.values())[1:] == ["info", LOG.name, "100 %s of\n'x'"]
    assert list(text) == ["time", "level", "logger", "text"]
    assert list(fields.values())[1:] == ["warning", LOG.name, "round", 3]
    assert list(fields) == ["time", "level", "logger", "event", "round"]
    assert signed_documents.moment(text["time"]) <= signed_documents.now()


def test_words_keep_their_lines_and_no_control_character(capsys: pytest.CaptureFixture[str]) -> None:
    with logs.output():
        LOG.info("a file\n  \x1b[2J\r名.png")
    assert capsys.readouterr() == ("", "a file\n  \\x1b[2J\\r名.png\n")


@pytest.mark.parametrize("as_json", [True, False])
def test_a_traceback_is_never_written(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever logs an exception by mistake tells nobody of the file or the patient it names."""
    with logs.output(as_json=as_json):
        try:
            raise ValueError("patient Smith")
        except ValueError:
            LOG.exception("it broke", stack_info=True)
    said = capsys.readouterr().err
    assert "it broke" in said
    assert "Smith" not in said
    assert "Traceback" not in said
    assert "test_logs" not in said


def test_no_handler_of_others_gets_a_record_and_all_is_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    """Flower's handlers may send to a server; those of its logger and of the root see nothing of ours."""
    from flwr.common import logger as flowers

    others, seen = [logging.getLogger(), flowers.FLOWER_LOGGER], list[logging.LogRecord]()
    spy, ours = logging.Handler(), logging.getLogger(logs.NAME)
    spy.emit = seen.append  # type: ignore[method-assign]
    before = [(one.level, list(one.handlers), one.propagate) for one in (*others, ours)]
    for one in others:
        one.addHandler(spy)
    try:
        with logs.output():
            LOG.error("for people here")
            with logs.output(level=logging.CRITICAL):
                LOG.error("nobody reads it")
            LOG.error("again")
    finally:
        for one in others:
            one.removeHandler(spy)
    assert seen == []
    assert capsys.readouterr().err == "for people here\nagain\n"
    assert [(one.level, list(one.handlers), one.propagate) for one in (*others, ours)] == before


def test_loggers_are_limited_for_a_while() -> None:
    one, two = logging.getLogger("fedvfm-test-one"), logging.getLogger("fedvfm-test-two")
    two.setLevel(logging.DEBUG)
    with contextlib.suppress(KeyError), logs.limited(logging.ERROR, one.name, two.name):
        assert (one.level, two.level) == (logging.ERROR, logging.ERROR)
        raise KeyError
    assert (one.level, two.level) == (logging.NOTSET, logging.DEBUG)


def test_importing_configures_nothing() -> None:
    script = (
        "import logging; root = list(logging.getLogger().handlers)\n"
        "import fedvfm.cli.main, fedvfm.server.supervisor, fedvfm.client.process.supervisor\n"
        "import fedvfm.simulation.engines.deployment\n"
        "ours = logging.getLogger('fedvfm')\n"
        "assert (ours.handlers, ours.level, ours.propagate) == ([], 0, True)\n"
        "assert logging.getLogger().handlers == root == []\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def test_every_logger_is_below_ours_even_of_a_module_that_runs_as_a_process() -> None:
    """``__name__`` is "__main__" there: its records would go to the root."""
    texts = {path: path.read_text() for path in PACKAGE.rglob("*.py")}
    users = {path: text for path, text in texts.items() if "LOG = logging.getLogger(__" in text}
    assert len(users) > 10
    for path, text in users.items():
        named = "__spec__.name" if 'if __name__ == "__main__":' in text else "__name__"
        assert f"LOG = logging.getLogger({named})" in text, path
