"""The chain: order, limits, failures with a name, and hooks that cannot be."""

import asyncio
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qvq_serve import metrics
from qvq_serve.errors import UsageError
from qvq_serve.hooks import Context, Hook, Refuse
from qvq_serve.hooks.chain import Chain, HookFailed, load
from qvq_serve.hooks.safety import Guard, Verdict, parse_verdict
from qvq_serve.profile import Profile


class First(Hook):
    name = "first"

    async def before(self, context: Context) -> None:
        context.state.setdefault("calls", []).append(self.name)


class Second(First):
    name = "second"


class Slow(Hook):
    name = "slow"

    async def before(self, context: Context) -> None:
        await asyncio.sleep(10)


class Raising(Hook):
    name = "raising"

    async def before(self, context: Context) -> None:
        raise KeyError("a fault")


class Refusing(Hook):
    async def before(self, context: Context) -> None:
        raise Refuse("not here", 403)


class Faulty(Hook):
    def __init__(self, profile: Profile) -> None:
        raise OSError("no file")


def run(*hooks: type[Hook], timeout: float = 0.1) -> Context:
    context = Context(None)
    asyncio.run(Chain([hook(Profile()) for hook in hooks], timeout).before(context))
    return context


def failures(name: str) -> float:
    return metrics.HOOK_FAILURES.labels(name)._value.get()


def test_hooks_run_in_their_order_and_only_where_they_override() -> None:
    assert run(First, Hook, Second).state["calls"] == ["first", "second"]
    assert Chain([Hook(Profile())], 1).stages == {"before": [], "on_image": [], "on_text": [], "after": []}


@pytest.mark.parametrize("hook", [Slow, Raising])
def test_a_hook_that_fails_is_named_and_counted(hook: type[Hook]) -> None:
    before = failures(hook.name)
    with pytest.raises(HookFailed, match=f"the server's hook {hook.name} failed"):
        run(hook)
    assert failures(hook.name) == before + 1


def test_a_refusal_is_no_failure() -> None:
    with pytest.raises(Refuse, match="not here"):
        run(Refusing)


def test_hooks_are_loaded_by_name_beside_ours_and_can_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside_the_user.py").write_text("from qvq_serve.hooks import Hook\nclass Mine(Hook): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    mine = "beside_the_user:Mine"
    last = ["request", "governor"]
    assert [hook.name for hook in load(Profile(hook=mine))] == ["answer", "language", "Mine", *last]
    assert [hook.name for hook in load(Profile(hook=mine, without_hooks="answer,Mine"))] == ["language", *last]
    assert [hook.name for hook in load(Profile(guard_url="http://guard"))] == ["answer", "language", "guard", *last]


def test_hooks_of_installed_packages_come_after_the_flags_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "somebodys-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1.0\n")
    points = "[qvq_serve.hooks]\nb = tests.unit.test_hooks:Second\na = tests.unit.test_hooks:First\n"
    (package / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    hooks = load(Profile(hook="tests.unit.test_hooks:Slow"))
    assert [hook.name for hook in hooks][2:] == ["slow", "first", "second", "request", "governor"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hook": "tests.unit.test_hooks"}, "package.module:Class is expected"),
        ({"hook": "tests.unit.test_hooks:Nobody"}, "cannot be imported"),
        ({"hook": "no_such_package:Hook"}, "cannot be imported"),
        ({"hook": "json:dumps"}, "is no class that derives from qvq_serve.hooks.Hook"),
        ({"hook": "tests.unit.test_hooks:Faulty"}, "the hook Faulty cannot be made: OSError('no file')"),
        ({"without_hooks": "langage"}, "--without-hooks langage: there is no such hook"),
        ({"guard_url": "http://guard", "guard_blocks": "bad"}, "--guard-blocks bad"),
        ({"guard_url": "http://guard", "guard_blocks": "controversial"}, "--guard-blocks must have unsafe in it"),
        ({"guard_url": "http://guard", "guard_extra_body": "{"}, "--guard-extra-body is no JSON"),
        ({"guard_url": "http://guard", "guard_extra_body": "[1]"}, "--guard-extra-body [1]: it must be a JSON object"),
    ],
)
def test_a_hook_that_cannot_be_is_said_at_the_start(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        load(Profile(**options))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        # Qwen3Guard-Gen's model card: a prompt, then a response.
        ("Safety: Unsafe\nCategories: Violent", Verdict("unsafe", ("Violent",))),
        ("Safety: Safe\nCategories: None\nRefusal: Yes", Verdict("safe")),
        ("Safety: Controversial\nCategories: Politically Sensitive Topics, PII\nRefusal: No",
         Verdict("controversial", ("Politically Sensitive Topics", "PII"))),
        # Llama Guard 3 and 4: two line ends may go before.
        ("\n\nsafe", Verdict("safe")),
        ("\n\nunsafe\nS9", Verdict("unsafe", ("S9",))),
        ("unsafe\nS1,S10", Verdict("unsafe", ("S1", "S10"))),
        # No verdict: a model that is no guard, or one that was cut.
        ("I think that this is safe to say.", None),
        ("safe or unsafe?", None),
        ("", None),
    ],
)  # fmt: skip
def test_the_published_outputs_of_guards_are_read(text: str, verdict: Verdict | None) -> None:
    assert parse_verdict(text) == verdict


@pytest.mark.parametrize(("model", "images"), [("Llama-Guard-4-12B", 1), ("Qwen3Guard-Gen-8B", 0)])
def test_a_guard_that_sees_gets_the_images_and_others_the_texts(model: str, images: int) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    text = {"type": "text", "text": "Is this safe?"}
    messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": [image, text]}]
    guard = Guard(Profile(guard_url="http://guard", guard_model=model))
    (turn,) = guard.conversation(Context(SimpleNamespace(messages=messages)), model)
    system = {"type": "text", "text": "Think."}
    assert turn == {"role": "user", "content": [system, image, text] if images else "Think.\nIs this safe?"}


def test_a_guard_gets_turns_that_alternate_whatever_a_client_sends() -> None:
    """A guard whose template refuses others gave no verdict, which under --guard-failure open let all pass."""
    guard = Guard(Profile(guard_url="http://guard", guard_model="Qwen3Guard-Gen-8B"))
    begun = SimpleNamespace(messages=[{"role": "assistant", "content": "I"}, {"role": "assistant", "content": "will"}])
    turns = guard.conversation(Context(begun), "Qwen3Guard-Gen-8B", {"role": "assistant", "content": "do it."})
    assert turns == [{"role": "user", "content": ""}, {"role": "assistant", "content": "I\nwill\ndo it."}]


@pytest.mark.parametrize("url", ["http://169.254.169.254/latest", "file:///etc/passwd"])
def test_a_guard_that_sees_fetches_nothing_by_itself(url: str) -> None:
    """It would fetch what our policy refuses, or see another picture than the model."""
    guard = Guard(Profile(guard_url="http://guard", guard_model="Llama-Guard-4-12B"))
    for image in ({"url": url}, url):
        content = [{"type": "image_url", "image_url": image}]
        with pytest.raises(Refuse, match="must come as data: URLs"):
            asyncio.run(guard.before(Context(SimpleNamespace(messages=[{"role": "user", "content": content}]))))


@pytest.mark.parametrize(("status", "kind", "body", "passes"), [
    (200, "text/html", "<html>Log in</html>", True), (200, "application/json", "{", True),
    (200, "application/json", '{"error": "busy"}', True), (500, "application/json", "{}", True),
    (400, "application/json", '{"error": {"message": "above the context length"}}', False),
])  # fmt: skip
def test_what_a_guard_cannot_read_does_not_pass_and_one_that_is_not_there_does_where_it_may(
    status: int, kind: str, body: str, passes: bool
) -> None:
    """A prompt beyond its context went past it under --guard-failure open; a proxy's page was a 500."""

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    context = Context(SimpleNamespace(messages=[{"role": "user", "content": "Hi"}]))
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as there:
        threading.Thread(target=there.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{there.server_port}"
        for failure in ("open", "closed"):
            guard = Guard(Profile(guard_url=url, guard_model="g", guard_failure=failure))
            if passes and failure == "open":
                asyncio.run(guard.before(context))
            else:
                with pytest.raises(Refuse, match="the guard did not answer"):
                    asyncio.run(guard.before(context))
        there.shutdown()


def test_a_guard_that_hangs_takes_one_timeout_of_its_hook(caplog: pytest.LogCaptureFixture) -> None:
    """It took three, one for each call, and then failed the request as a hook that is too slow."""
    context = Context(SimpleNamespace(messages=[{"role": "user", "content": "Hi"}]))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        guard = Guard(Profile(guard_url=url, guard_timeout=0.5, hook_timeout=1.2, guard_failure="open"))
        asyncio.run(Chain([guard], 1.2).before(context))
    assert "the guard gave no verdict on the prompt" in caplog.text
