"""Messages: both ways, bounded in every field, open to what nobody knows yet, and never a traceback."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.hosts import GUEST, SOURCE
from virtmig.errors import LocalProtocolError, RemoteProtocolError
from virtmig.facts import HostFacts, KnownDomain
from virtmig.link.messages import (
    CONTROL,
    FACTS_LONGEST_BYTES,
    MESSAGES,
    Agreement,
    AllOpen,
    Answer,
    Attached,
    Attachment,
    ChannelCount,
    ChannelName,
    ChannelOpened,
    Failed,
    Finished,
    Hello,
    Message,
    OpenChannel,
    Ping,
    Pong,
    Proposal,
    Reason,
    Refuse,
    Resume,
    ResumeAccepted,
    Verdict,
    channel_order,
    clip,
    decode_payload,
    encode_payload,
)

P = bytes(32)
EXAMPLES: tuple[Message, ...] = (
    Hello(version_lowest=1, version_highest=3, implementation="opal 0", nonce=P, facts=SOURCE, mandatory=("resume",)),
    Proposal(
        version=1,
        request={"live": True, "xml": "<x/>", "n": 3, "l": ("a", "b")},
        guest=GUEST,
        window_bytes=1 << 20,
        attachments=(Attachment(uri="unix:///run/virtmig/1/m.sock", place="8:1"),),
    ),
    Answer(
        verdicts=(Verdict(feature="multifd", outcome="adjusted", reason="five", asked="10", given="5"),),
        settled={"live": True},
        channels=(ChannelCount("main", 1), ChannelCount("parallel", 5)),
        limits={"parallel-connections": 5},
        warnings=(Reason("tls", "not seen"),),
    ),
    Agreement(session=bytes(16), channels=(ChannelName("main"), ChannelName("parallel", 1)), window_bytes=1 << 20),
    OpenChannel(session=bytes(16), role="parallel", index=2, proof=P),
    ChannelOpened(role="parallel", index=2, proof=P),
    AllOpen(channels=4),
    Refuse(reasons=(Reason("postcopy", "no userfaultfd", "sysctl"),)),
    Failed(reason="the disk is full", guest="source"),
    Finished(),
    Ping(number=1),
    Pong(number=0xFFFFFFFF),
    Attached(role="priority", index=0),
    Resume(session=bytes(16), role="control", index=0, attempt=1, received_up_to=1 << 50, proof=P),
    ResumeAccepted(role="main", index=0, attempt=1, received_up_to=0, proof=P),
)


def raw(message: Message, **changes: Any) -> bytes:
    """The msgpack of a message with some keys changed; None takes one away."""
    keys = msgspec.msgpack.decode(encode_payload(message)) | changes
    return msgspec.msgpack.encode({name: value for name, value in keys.items() if value is not None})


def example(kind: type[Message]) -> Message:
    return next(message for message in EXAMPLES if type(message) is kind)


def test_every_message_is_shown_here() -> None:
    assert {type(message) for message in EXAMPLES} == set(MESSAGES)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_both_ways(message: Message) -> None:
    payload = encode_payload(message)
    assert decode_payload(type(message), payload) == message
    assert msgspec.msgpack.decode(payload)["message"] == type(message).__struct_config__.tag


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_keys_that_nobody_knows_are_ignored(message: Message) -> None:
    grown = raw(message, **{"from the future": [{"a": 1}, None, b"\x00"]})
    assert decode_payload(type(message), grown) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_cut_anywhere_it_is_refused(message: Message) -> None:
    payload = encode_payload(message)
    for at in range(0, len(payload), 1 if len(payload) < 400 else 37):
        with pytest.raises(RemoteProtocolError):
            decode_payload(type(message), payload[:at])
    with pytest.raises(RemoteProtocolError):
        decode_payload(type(message), payload + b"\xc0")


def test_the_tag_must_be_that_of_the_frame() -> None:
    with pytest.raises(RemoteProtocolError, match="pong"):
        decode_payload(Pong, encode_payload(Ping(number=1)))
    with pytest.raises(RemoteProtocolError):
        decode_payload(Ping, msgspec.msgpack.encode({"number": 1, "message": 11}))


#: (message, field, a value just outside of its bound)
OUTSIDE: list[tuple[type[Message], str, Any]] = [
    (Hello, "version_lowest", 4),
    (Hello, "version_highest", 0x10000),
    (Hello, "version_lowest", -1),
    (Hello, "implementation", "x" * 129),
    (Hello, "nonce", bytes(31)),
    (Hello, "nonce", bytes(33)),
    (Hello, "features", ["x"] * 65),
    (Hello, "mandatory", ["x" * 65]),
    (Hello, "proof", bytes(33)),
    (Hello, "keyed", 1),
    (Hello, "facts", {"uri": "x" * FACTS_LONGEST_BYTES}),
    (Hello, "facts", {"uri": 5}),
    (Proposal, "version", -1),
    (Proposal, "request", {str(number): True for number in range(257)}),
    (Proposal, "request", {"x" * 65: True}),
    (Proposal, "request", {"xml": "x" * (256 * 1024 + 1)}),
    (Proposal, "request", {"list": ["x"] * 257}),
    (Proposal, "request", {"list": ["x" * 1025]}),
    (Proposal, "request", {"nested": {"a": 1}}),
    (Proposal, "fixed", ["x" * 65]),
    (Proposal, "window_bytes", 65535),
    (Proposal, "window_bytes", (1 << 30) + 1),
    (Proposal, "guest", {"name": "x" * FACTS_LONGEST_BYTES}),
    (Proposal, "attachments", [{"uri": "unix:///m"}] * 9),
    (Answer, "attachment", {"uri": "x" * 1025}),
    (Answer, "verdicts", [{"feature": "x", "outcome": "perhaps", "reason": ""}]),
    (Answer, "verdicts", [{"feature": "x", "outcome": "accepted", "reason": "x" * 1025}]),
    (Answer, "verdicts", [{"feature": "x", "outcome": "accepted", "reason": ""}] * 257),
    (Answer, "channels", [{"role": "main", "count": 1}] * 5),
    (Answer, "channels", [{"role": "main", "count": 0}]),
    (Answer, "channels", [{"role": "parallel", "count": 513}]),
    (Answer, "channels", [{"role": "control", "count": 1}]),
    (Answer, "limits", {"x": -1}),
    (Answer, "limits", {str(number): 1 for number in range(65)}),
    (Answer, "warnings", [{"feature": "x", "reason": ""}] * 65),
    (Agreement, "session", bytes(15)),
    (Agreement, "secret", bytes(33)),
    (Agreement, "channels", []),
    (Agreement, "channels", [{"role": "main", "index": 0}] * 513),
    (Agreement, "channels", [{"role": "main", "index": 512}]),
    (Agreement, "window_bytes", 0),
    (OpenChannel, "role", "control"),
    (OpenChannel, "index", 512),
    (OpenChannel, "proof", bytes(31)),
    (ChannelOpened, "role", "multifd"),
    (AllOpen, "channels", 0),
    (Refuse, "reasons", []),
    (Refuse, "reasons", [{"feature": "x", "reason": ""}] * 65),
    (Failed, "reason", "x" * 1025),
    (Failed, "guest", "x" * 65),
    (Ping, "number", 1 << 32),
    (Pong, "number", -1),
    (Resume, "attempt", 0),
    (Resume, "received_up_to", -1),
    (Resume, "session", bytes(17)),
    (ResumeAccepted, "role", "else"),
]


@pytest.mark.parametrize(
    ("kind", "field", "value"), OUTSIDE, ids=lambda item: item if isinstance(item, str) and len(item) < 30 else ""
)
def test_a_field_outside_of_its_bound_is_refused_both_ways(kind: type[Message], field: str, value: Any) -> None:
    with pytest.raises(RemoteProtocolError) as broken:
        decode_payload(kind, raw(example(kind), **{field: value}))
    assert str(broken.value).startswith(str(kind.__struct_config__.tag))
    if not isinstance(value, (list, dict)):
        with pytest.raises(LocalProtocolError):
            encode_payload(msgspec.structs.replace(example(kind), **{field: value}))


def test_every_field_with_a_length_or_range_was_taken_outside() -> None:
    bounded = {
        (kind, field.encode_name)
        for kind in MESSAGES
        for field in msgspec.structs.fields(kind)
        if field.encode_name not in ("index", "role", "proof", "version", "settled", "session", "attempt", "channels",
                                     "received_up_to", "number")
    }  # fmt: skip
    assert bounded - {(kind, field) for kind, field, _ in OUTSIDE} == set()


@pytest.mark.parametrize("kind", MESSAGES)
def test_required_fields_are_required(kind: type[Message]) -> None:
    for field in msgspec.structs.fields(kind):
        if field.required:
            with pytest.raises(RemoteProtocolError, match=field.encode_name):
                decode_payload(kind, raw(example(kind), **{field.encode_name: None}))


def test_facts_of_a_large_host_are_refused_here_already() -> None:
    domains = tuple(KnownDomain(f"guest-{number}", "u" * 36, True) for number in range(4000))
    facts = HostFacts(uri="qemu:///system", domains=domains)
    with pytest.raises(LocalProtocolError, match="facts of"):
        encode_payload(Hello(version_lowest=1, version_highest=1, implementation="", nonce=P, facts=facts))


def test_nesting_without_end_is_refused() -> None:
    deep = b"\x91" * 100_000 + b"\xc0"
    with pytest.raises(RemoteProtocolError):
        decode_payload(Ping, b"\x83\xa7message\xa4ping\xa6number\x01\xa1x" + deep)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(MESSAGES), st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(kind: type[Message], payload: bytes) -> None:
    try:
        decode_payload(kind, payload)
    except RemoteProtocolError as broken:
        assert broken.message


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(EXAMPLES), st.data())
def test_a_message_with_bytes_changed_is_a_message_or_a_protocol_error(message: Message, data: st.DataObject) -> None:
    payload = bytearray(encode_payload(message))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode_payload(type(message), payload)
    except RemoteProtocolError as broken:
        assert broken.message


def test_the_order_of_channels() -> None:
    counts = [
        ChannelCount("storage", 2),
        ChannelCount("priority", 1),
        ChannelCount("parallel", 2),
        ChannelCount("main", 1),
    ]
    names = ["main", "parallel 0", "parallel 1", "priority", "storage 0", "storage 1"]
    assert [str(channel) for channel in channel_order(counts)] == names
    assert str(CONTROL) == "control"


def test_clipped_text_fits_and_says_so() -> None:
    assert clip("short") == "short"
    assert clip("x" * 2000) == "x" * 1023 + "…"
