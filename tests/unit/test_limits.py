"""What a body may hold, before vLLM's own model reads it; the rest is in tests/engine/test_fuzz.py."""

from pathlib import Path
from typing import Any

import pytest

from qvq_serve.api.door import Keys, digest
from qvq_serve.api.limits import check_body
from qvq_serve.profile import Profile


def body(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}], **more}


def deep(levels: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(levels):
        inner = [inner]
    return inner


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (body({"type": "text", "text": 5}), "messages[0] has a part of type 'text' whose text is no string"),
        (body({"type": "text"}), "whose text is no string"),
        (body("text"), "messages[0] has a part of type None; it must be one of text, image_url"),
        (
            body({"type": "image_url", "image_url": 5}),
            "messages[0] has a part of type 'image_url' whose image_url is no",
        ),
        ({"messages": "no list"}, "messages must be a list of objects"),
        ({"messages": None}, "messages must be a list of objects"),
        (body({"type": "refusal", "refusal": "past the guard"}), "has a part of type 'refusal'"),
        (body({"type": "input_text", "text": "past the guard"}), "has a part of type 'input_text'"),
        (body(*[{"type": "text", "text": "a"}] * 1025), "more than 1024 parts"),
        (body(stop=["\ud800"]), "stop has half of a surrogate pair"),
        (body(bad_words=["\ud800"]), "bad_words has half"),
        (body(chat_template_kwargs={"\ud800": 1}), "chat_template_kwargs has half"),
        (body(chat_template_kwargs={"x": 10**30}), "chat_template_kwargs has a number of more than 64 bits"),
        (body(top_k=10**30), "top_k has a number of more than 64 bits"),
        (body(chat_template_kwargs={"x": deep(2000)}), "chat_template_kwargs is nested too deeply"),
    ],
)
def test_what_no_client_may_send_is_named(sent: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_body(sent)
    assert message in str(error.value)


def test_ordinary_bodies_pass() -> None:
    image = {"type": "image_url", "image_url": {"url": "x"}}
    for sent in (body({"type": "text", "text": "a"}, image), body({"text": "a"}), {}):
        check_body(sent)
    unset = {"messages": [{"role": "user", "content": None, "name": None}]}
    check_body(unset)
    assert unset["messages"] == [{"role": "user", "content": None}]


def test_a_file_of_keys_that_is_no_text_leaves_the_keys_as_they_are(tmp_path: Path) -> None:
    """Each request with a valid key got a 400 with the decoder's error."""
    file = tmp_path / "keys"
    file.write_bytes("\ufeffsk-a\n".encode())
    keys = Keys(Profile(api_key_file=str(file)), None)
    assert keys.owner("Bearer sk-a") == digest("sk-a")
    file.write_bytes("sk-a\n# schlüssel\nsk-b\n".encode("latin-1"))
    assert keys.owner("Bearer sk-a") == digest("sk-a")
    assert keys.owner("Bearer sk-b") is None


def test_a_key_beyond_ascii_opens() -> None:
    """ASGI hands headers on as bytes; the door reads them as Latin-1, and a client sends the key's UTF-8."""
    keys = Keys(Profile(), "schlüssel-à")
    assert keys.owner("Bearer " + "schlüssel-à".encode().decode("latin-1")) == digest("schlüssel-à")
    assert keys.owner("Bearer schlüssel-a") is None
