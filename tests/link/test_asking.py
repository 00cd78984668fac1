"""What a client and its agent say to each other: every message both ways, and what is no message."""

from __future__ import annotations

import json

import pytest

from tests.support.hosts import DESTINATION, GUEST
from virtmig.errors import RemoteProtocolError
from virtmig.link.asking import (
    ASKED,
    LINE_LONGEST_BYTES,
    Agreed,
    Begin,
    Changed,
    Ended,
    Exchanged,
    Facts,
    GiveUp,
    HostSaid,
    Lines,
    Problem,
    Refused,
    Said,
    SessionRecord,
    Sessions,
    SessionsSaid,
    decode_asked,
    decode_said,
    encode_line,
)
from virtmig.link.messages import Answer, Attachment, ChannelCount, ChannelName, Reason, Verdict

QUESTIONS = (
    Facts(),
    Sessions(),
    Begin(destination="tcp:beryl:4711", request={"live": True, "threads": 3}, guest=GUEST, facts=DESTINATION,
          fixed=("threads",), only_handshake=True),
    GiveUp(reason="enough", guest="source"),
)  # fmt: skip
ANSWER = Answer(
    verdicts=(Verdict(feature="multifd", outcome="adjusted", reason="fewer", asked="9", given="3"),),
    channels=(ChannelCount("main", 1), ChannelCount("parallel", 3)),
)
SAYINGS: tuple[Said, ...] = (
    HostSaid(facts=DESTINATION, implementation="x", details={"links": [1]}),
    SessionsSaid(sessions=(SessionRecord(session="5f", role="source", domain="opal", request={"live": True}),)),
    Exchanged(source=True, name="Hello", ms=1.5, content={"version_lowest": 1}),
    Agreed(session="5f", answer=ANSWER, channels=(ChannelName("main"),), peer="beryl", ms=2.5,
           attachment=Attachment(uri="unix:///x"), round_trips=3),
    Refused(reasons=(Reason("multifd", "no", "yes"),), by_peer=False),
    Changed(state="running", words="without main"),
    Ended(state="failed", reasons=(Reason("", "gone"),), guest="source"),
    Problem(text="it cannot be", hint="another", kind="RequestError"),
)  # fmt: skip


def test_every_question_and_every_answer_comes_back() -> None:
    assert {type(question) for question in QUESTIONS} == set(ASKED)
    for question in QUESTIONS:
        line = encode_line(question)
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        assert decode_asked(line) == question
        assert json.loads(line)["ask"] == type(question).__name__.lower()
    for said in SAYINGS:
        assert decode_said(encode_line(said)) == said
    names = [json.loads(encode_line(said))["said"] for said in SAYINGS]
    assert names == ["facts", "sessions", "message", "agreed", "refused", "state", "ended", "error"]


@pytest.mark.parametrize(
    "line",
    [b"", b"null", b"[]", b'{"ask":"facts"', b'{"ask":7}', b'{"said":"agreed"}', b"\xff\xfe", b"[" * 100_000,
     b'{"ask":"begin","destination":7}', b'{"said":"facts","facts":{}}'],
)  # fmt: skip
def test_what_is_none(line: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="not a question to an agent: "):
        decode_asked(line)
    with pytest.raises(RemoteProtocolError, match="not an agent's answer: "):
        decode_said(line)


def test_what_a_newer_one_adds_is_not_minded() -> None:
    assert decode_asked(b'{"ask":"facts","since":"2.0"}') == Facts()
    assert decode_said(b'{"said":"state","state":"running","more":[1]}') == Changed(state="running")


def test_lines_in_pieces_and_their_bound() -> None:
    lines = Lines()
    whole = encode_line(Facts()) + encode_line(Sessions())
    found = [line for at in range(len(whole)) for line in lines.feed(whole[at : at + 1])]
    assert [decode_asked(line) for line in found] == [Facts(), Sessions()]
    assert lines.feed(b"\n \n" + whole[:5]) == []
    assert lines.feed(whole[5:])[0] == whole.partition(b"\n")[0]
    assert lines.feed(b"x" * LINE_LONGEST_BYTES) == []
    with pytest.raises(RemoteProtocolError, match="a line of more than 2097152 bytes"):
        lines.feed(b"x")
