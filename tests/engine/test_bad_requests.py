"""A request that cannot be gets an OpenAI error object with the right status, and the server lives."""

import base64
import gzip
import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.engine.conftest import Server, data_url, photo, png, user


def refused(server: Server, *parts: str | dict[str, str]) -> str:
    """The message of a refusal by 400."""
    answer = server.chat(user(*parts))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (400, 400, "BadRequestError"), error
    assert "Traceback" not in error["message"]
    assert server.alive()
    return error["message"]


def inline(content: bytes, kind: str = "image/png") -> dict[str, str]:
    return {"url": f"data:{kind};base64,{base64.b64encode(content).decode()}"}


def test_an_unreadable_image_is_refused(server: Server) -> None:
    assert "cannot be read" in refused(server, inline(b"no image"), "What?")
    assert "cannot be read" in refused(server, inline(png(photo(64, 64))[:200]), "What?")
    assert "cannot be read" in refused(server, inline(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "What?")
    assert "cannot be read" in refused(server, {"url": "data:image/png;base64,@@@"}, "What?")
    assert "cannot be read" in refused(server, {"url": "data:image/png,plain"}, "What?")
    assert "cannot be read" in refused(server, {"url": "data:image/png"}, "What?")


def test_a_long_data_url_is_not_echoed(server: Server) -> None:
    assert len(refused(server, inline(b"no image" * 10_000), "What?")) < 400


def test_an_image_url_that_hangs_is_refused_in_time(server: Server, web: str) -> None:
    assert f"image 1 of 1 ('{web}/hang') was not fetched within 2 s" in refused(server, {"url": f"{web}/hang"}, "What?")


def test_an_image_url_that_leads_to_no_image_is_refused(server: Server, web: str) -> None:
    gone = refused(server, {"url": f"{web}/none.png"}, "What?")
    assert gone == f"image 1 of 1 ('{web}/none.png') cannot be fetched: HTTP 404"
    assert "cannot be read" in refused(server, {"url": f"{web}/page.html"}, "What?")
    assert "cannot be fetched" in refused(server, {"url": "http://127.0.0.1:9/photo.png"}, "What?")
    assert "has the scheme 'gopher'" in refused(server, {"url": "gopher://127.0.0.1/photo.png"}, "What?")
    assert "is empty" in refused(server, {"url": ""}, "What?")
    assert "this server reads from 127.0.0.1" in refused(server, {"url": "http://169.254.169.254/latest"}, "What?")


def test_each_image_is_named_by_its_position(server: Server) -> None:
    good = {"url": data_url(photo(64, 64))}
    assert refused(server, good, good, inline(b"no image"), "What?").startswith("image 3 of 3 (")


def test_an_image_of_too_many_bytes_or_pixels_is_refused_before_it_is_decoded(server: Server) -> None:
    bomb = png(Image.new("1", (9_000, 9_000)))
    assert len(bomb) < 100_000
    assert "has 9000x9000 px, above the 50000000 that this server decodes" in refused(server, inline(bomb), "What?")
    assert "has more than 20000000 bytes" in refused(server, inline(b"x" * 20_000_001), "What?")


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_an_image_of_more_than_eight_bits_is_refused(server: Server, mode: str) -> None:
    """The model saw white: Pillow cuts what is above 255 off."""
    content = io.BytesIO()
    photo(64, 64).convert("L").convert(mode).save(content, "TIFF")
    assert f"has the mode {mode}, more than 8 bits a channel" in refused(server, inline(content.getvalue()), "What?")


def test_a_jpeg_of_a_thousand_scans_is_refused_before_it_is_decoded(server: Server) -> None:
    """A thread that all images share worked on one for minutes, past --image-timeout."""
    buffer = io.BytesIO()
    photo(64, 64).save(buffer, "JPEG", progressive=True)
    scan = buffer.getvalue().rsplit(b"\xff\xda", 1)[1].removesuffix(b"\xff\xd9")
    many = buffer.getvalue().removesuffix(b"\xff\xd9") + (b"\xff\xda" + scan) * 1000 + b"\xff\xd9"
    refused = server.chat(user(inline(many, "image/jpeg"), "What?"))
    assert refused.status_code == 400
    assert "scans, above the 64 that this server decodes" in refused.json()["error"]["message"]


def test_an_icon_is_refused_before_it_is_decoded(server: Server) -> None:
    content = io.BytesIO()
    photo(64, 64).save(content, "ICO")
    assert "it is no image of a kind that is known here" in refused(server, inline(content.getvalue()), "What?")


def test_a_film_behind_a_photo_counts_no_scans(server: Server) -> None:
    """As phones write them; its bytes hold what looks like a scan's begin, and most were refused."""
    buffer = io.BytesIO()
    photo(64, 64).save(buffer, "JPEG")
    moving = inline(buffer.getvalue() + b"\xff\xda" * 1000, "image/jpeg")
    assert server.chat(user(moving, "What?"), max_tokens=1).status_code == 200


def test_scans_cannot_be_hidden_from_the_count() -> None:
    from qvq_serve.hooks.images import scans_of

    many = b"\xff\xda\x00\x02" * 100
    assert scans_of(b"\xff\xd8" + many + b"\xff\xd9" + many) == 100
    assert scans_of(b"\xff\xd8\xff\x01\x7f\xff" + many + b"\xff\xd9") == 100  # read as a length, it would skip them
    assert scans_of(b"\xff\xd8" + b"\xff\xfe\x00\x02" * 20_000 + many) > 64


def nested(depth: int) -> dict[str, Any]:
    return {"items": nested(depth - 1)} if depth else {}


UNIQUE = {"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True}
TAG = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": {"pattern": "(a|b|c){1,5000}"}}}
MANY_PROPERTIES = {"properties": {f"p{at}": {} for at in range(1200)}, "minProperties": 200}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"structured_outputs": {"json": "{"}}, "the grammar cannot be used: Expecting property name"),
        ({"structured_outputs": {"regex": "[a-"}}, "the grammar cannot be used: Regex parsing error at position 4"),
        ({"structured_outputs": {"json": {"enum": []}}}, "the grammar cannot be used: enum array must not be empty"),
        (
            {"structured_outputs": {"json": {"pattern": "(a|b|c){1,5000}"}}},
            "the grammar's patterns repeat 75000 characters",
        ),
        ({"structured_outputs": {"json": {"patternProperties": {"(a|b|c){5000}": {}}}}}, "patterns repeat 65000"),
        ({"structured_outputs": {"json": MANY_PROPERTIES}}, "the grammar counts 240000 properties"),
        ({"structured_outputs": {"structural_tag": json.dumps(TAG)}}, "patterns repeat 75000"),
        ({"response_format": TAG}, "patterns repeat 75000"),
        ({"structured_outputs": {"json": nested(100)}}, "The JSON schema is nested too deeply"),
        ({"structured_outputs": {"json": UNIQUE}}, "does not enforce, such as uniqueItems"),
        ({"structured_outputs": {"json": {}, "disable_any_whitespace": True}}, "disable_any_whitespace has no effect"),
        ({"thinking_token_budget": 2**70}, "thinking_token_budget"),
        (
            {"repetition_detection": {"max_pattern_size": 5, "min_pattern_size": 1, "min_count": 2**70}},
            "repetition_detection has a number",
        ),
        ({"bad_words": ["word " * 100]}, "the length of a bad word is 500; this server takes at most 256"),
        ({"chat_template_kwargs": {"system_prompt": "Past the guard."}}, "chat_template_kwargs.system_prompt is the"),
        ({"messages": [{"role": "User", "content": "Hi"}]}, "the role 'User' is not known"),
    ],
)
def test_what_was_a_500_or_went_past_the_guard_is_a_400(server: Server, body: dict[str, Any], message: str) -> None:
    answer = server.chat(user("Hi"), **body)
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (400, True), answer.text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"temperature": "hot"},
            "temperature: Input should be a valid number, unable to parse string as a number",
        ),
        ({"min_visual_tokens": 0}, "min_visual_tokens: Input should be greater than or equal to 1 (it is 0)"),
        ({"messages": None}, "messages must be a list of objects"),
        ({"messages": [5]}, 'messages must be a list of objects, for example [{"role": "user", "content": "Hi"}]'),
        ({"messages": [{"content": "Hi"}]}, "messages.0.role: Field required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: Input should be a valid string"),
        ({"structured_outputs": "x"}, 'structured_outputs must be an object, for example {"choice": ["yes", "no"]}'),
    ],
)
def test_an_invalid_field_is_told_in_words(server: Server, body: dict[str, Any], message: str) -> None:
    """Not as pydantic's own structures, all branches of a union among them."""
    told = server.chat(user("Hi"), **body).json()["error"]
    assert told["message"].startswith(message) and len(told["message"]) < 200
    assert (told["code"], told["type"]) == (400, "BadRequestError")


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"max_visual_tokens": 1_281}, "max_visual_tokens is 1281; this server takes 256 to 1280"),
        ({"min_visual_tokens": 1}, "min_visual_tokens is 1; this server takes 256 to 1280"),
        ({"min_visual_tokens": 600, "max_visual_tokens": 500}, "min_visual_tokens 600 is above max_visual_tokens 500"),
        ({"max_visual_tokens": "many"}, "max_visual_tokens"),
    ],
)
def test_bounds_that_the_server_does_not_take_are_refused(
    server: Server, bounds: dict[str, object], message: str
) -> None:
    answer = server.chat(user({"url": data_url(photo(64, 64))}, "What?"), **bounds)
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (400, True)


def test_a_file_outside_the_allowed_directory_is_refused(server: Server, image_dir: Path) -> None:
    for url in ("file:///etc/passwd", f"{image_dir.as_uri()}/../other.png", f"{image_dir.as_uri()}/none.png"):
        message = refused(server, {"url": url}, "What?")
        assert message.endswith("is no readable image below the server's --allowed-image-dir")
        assert str(image_dir) not in message


def test_a_files_image_has_the_bounds_of_others(server: Server, image_dir: Path) -> None:
    """It went by vLLM's own, of 178 megapixels and any kind, and 16 bits were seen white."""
    deep, icon = io.BytesIO(), io.BytesIO()
    photo(64, 64).convert("L").convert("I;16").save(deep, "PNG")
    photo(64, 64).save(icon, "ICO")
    for name, content, message in (
        ("deep.png", deep.getvalue(), "has the mode I;16, more than 8 bits a channel; save it with 8"),
        ("large.png", bytes(20_000_001), "has more than 20000000 bytes"),
        ("icon.png", icon.getvalue(), "is no readable image below the server's --allowed-image-dir"),
    ):
        (image_dir / name).write_bytes(content)
        assert refused(server, {"url": (image_dir / name).as_uri()}, "What?").endswith(message)
        (image_dir / name).unlink()


def test_a_shape_that_no_rule_brings_under_the_maximum_is_refused(server: Server) -> None:
    thin = Image.new("RGB", (2_010, 10))
    assert "more than 200 times as long as it is wide" in refused(server, {"url": data_url(thin)}, "What?")


def test_more_images_than_allowed_are_refused(server: Server) -> None:
    image = {"url": data_url(photo(64, 64))}
    assert "4 image" in refused(server, *[image] * 5, "What?")


@pytest.mark.parametrize("kind", ["video_url", "audio_url"])
def test_video_and_audio_are_refused_clearly(server: Server, web: str, kind: str) -> None:
    part = {"type": kind, kind: {"url": f"{web}/photo.png"}}
    answer = server.chat({"role": "user", "content": [part, {"type": "text", "text": "What?"}]})
    assert answer.status_code == 400
    assert kind.removesuffix("_url") in answer.json()["error"]["message"]
    assert server.alive()


def test_a_prompt_longer_than_the_context_is_refused(server: Server) -> None:
    assert "8192" in refused(server, "word " * 9_000)


NO_REQUESTS = [b"", b"{", b"[]", b'{"messages": 1}', b'{"messages": []}', b"\xff\xfe", b'{"a": "\xff"}', b"[" * 100_000]


@pytest.mark.parametrize("body", [*NO_REQUESTS, gzip.compress(b"{}")])
def test_a_body_that_is_no_request_is_refused(server: Server, body: bytes) -> None:
    headers = server.headers | {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers, timeout=30)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
    assert server.alive()


def test_a_method_that_is_none_is_refused_in_openais_shape(server: Server) -> None:
    answer = httpx.get(f"{server.url}/v1/chat/completions", headers=server.headers)
    assert (answer.status_code, answer.json()["error"]["message"]) == (405, "Method Not Allowed")


def test_the_log_has_no_traceback_of_a_bad_request(server: Server) -> None:
    refused(server, inline(b"no image"), "What?")
    assert "Traceback" not in server.log.read_text()
