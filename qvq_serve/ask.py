"""One question to a running server, streamed to the terminal."""

import base64
import mimetypes
import sys
import time
from pathlib import Path
from typing import Any

from qvq_serve.errors import StartError, UsageError

DIM, BRIGHT, PLAIN = "\033[2m", "\033[1m", "\033[0m"


def image_part(image: str) -> dict[str, Any]:
    """An image as a part of a message: a URL as it is, a file as a data URL. Raises UsageError for no such file."""
    if image.startswith(("https://", "http://")):
        url = image
    else:
        try:
            data = Path(image).read_bytes()
        except OSError as error:
            raise UsageError(f"the image {image} cannot be read: {error.strerror}.") from None
        kind = mimetypes.guess_type(image)[0] or "application/octet-stream"
        url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def ask(url: str, images: list[str], question: str, *, api_key: str | None, max_tokens: int) -> None:
    """Print the answer as it comes, the reasoning dimmed; then, on stderr, tokens, time and how it ended.

    Raises StartError where no server answers, UsageError where it refuses the request, with the server's reason.
    """
    import openai

    content = [*map(image_part, images), {"type": "text", "text": question}]
    client = openai.OpenAI(
        base_url=url.rstrip("/").removesuffix("/v1") + "/v1", api_key=api_key or "none", max_retries=0
    )
    started = time.monotonic()
    model = None
    try:
        model = client.models.list().data[0].id
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": content}],
            stream=True,
            max_tokens=max_tokens,
            stream_options={"include_usage": True},
        )  # type: ignore[call-overload]
        print_stream(stream, started)
    except openai.APIConnectionError:
        if model:
            raise StartError(f"{url}: the answer broke off; the server's log says why.") from None
        raise StartError(f"no server answers at {url}; `qvq-serve` starts one, --url names another.") from None
    except openai.APIError as error:
        body = error.body if isinstance(error.body, dict) else {}
        raise UsageError(f"{url} refused: {body.get('message') or error.message}") from None


def print_stream(stream: Any, started: float) -> None:
    """Print a stream of chat chunks: reasoning dimmed and answer bright on a terminal, parts apart elsewhere."""
    styles = {"reasoning": DIM, "content": BRIGHT} if sys.stdout.isatty() else {}
    usage, finish, last = None, None, None
    qvq: dict[str, Any] = {}
    for chunk in stream:
        usage = chunk.usage or usage
        qvq = getattr(chunk, "qvq", None) or qvq
        if error := getattr(chunk, "error", None):
            raise UsageError(f"the server failed: {error.get('message')}")
        for choice in chunk.choices or ():
            finish = choice.finish_reason or finish
            for part in ("reasoning", "content"):
                if text := getattr(choice.delta, part, None):
                    gap = "\n\n" if last not in (None, part) else ""
                    last, style = part, styles.get(part, "")
                    print(gap + style + text + (PLAIN if style else ""), end="", flush=True)
    print()
    if usage:
        ended = qvq.get("ended", finish)
        print(
            f"({usage.prompt_tokens} tokens in, {usage.completion_tokens} out, {time.monotonic() - started:.1f} s, "
            f"{ended})",
            file=sys.stderr,
        )
