"""Each image of a request: fetched under a policy, decoded within bounds, brought to the request's visual tokens."""

import asyncio
import base64
import binascii
import io
import re
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.multimodal.media.connector import MediaConnector, global_thread_pool
from vllm.multimodal.media.image import ImageMediaIO

from qvq_serve import metrics
from qvq_serve.engine import launched_profile
from qvq_serve.hooks import CONTEXT, Context, ImageInfo, Refuse, content_parts
from qvq_serve.hooks.chain import names
from qvq_serve.hooks.fetch import FetchError, fetch
from qvq_serve.visual import TOKEN_PX, resized, visual_tokens

SHOWN = 80
"""Characters of an image's address that an error shows; a data URL can have millions."""
LOW_DETAIL_TOKENS = 256
"""Visual tokens of an image with OpenAI's `detail: low`, at most; `high` and `auto` are the request's bounds."""
WANTED = "wanted_images"
"""Where a request's context keeps the images that its messages name."""


@dataclass
class Wanted:
    """An image that a request names: its position, of how many, and its bounds in visual tokens."""

    url: str
    index: int
    least: int
    most: int
    total: int = 0
    claimed: bool = field(default=False, compare=False)


def bound_images(context: Context) -> None:
    """Work out each image's bounds from the request's and `detail`. Raises Refuse for bounds that cannot be."""
    profile, request = launched_profile(), context.request
    least = request.min_visual_tokens or profile.min_visual_tokens
    most = request.max_visual_tokens or profile.max_visual_tokens
    for name, value in (("min_visual_tokens", least), ("max_visual_tokens", most)):
        if not profile.min_visual_tokens <= value <= profile.max_visual_tokens:
            raise Refuse(
                f"{name} is {value}; this server takes {profile.min_visual_tokens} to {profile.max_visual_tokens}"
            )
    if least > most:
        raise Refuse(f"min_visual_tokens {least} is above max_visual_tokens {most}; lower the one or raise the other")
    wanted: list[Wanted] = []
    for part in image_parts(request.messages):
        url, detail = part.get("url"), part.get("detail")
        low = max(least, min(most, LOW_DETAIL_TOKENS)) if detail == "low" else most
        wanted.append(Wanted(str(url), len(wanted), least, low))
    for image in wanted:
        image.total = len(wanted)
    context.state[WANTED] = wanted


def image_parts(messages: list[Any]) -> list[dict[str, Any]]:
    """The `image_url` objects of all messages, in order."""
    images = [part["image_url"] for part in content_parts(messages) if "image_url" in part]
    return [image if isinstance(image, dict) else {"url": image} for image in images]


def claim(url: str) -> Wanted:
    """The first image of the request with this address that was not fetched yet; outside our route, one of its own."""
    context, profile = CONTEXT.get(), launched_profile()
    for image in context.state.get(WANTED, ()) if context else ():
        if image.url == url and not image.claimed:
            image.claimed = True
            return image  # type: ignore[no-any-return]
    return Wanted(url, 0, profile.min_visual_tokens, profile.max_visual_tokens)


class ImageConnector(MediaConnector):  # type: ignore[misc]
    """vLLM's connector, with the launch's policy and limits, and with every way to fail made the client's error."""

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        wanted = claim(image_url)
        try:
            return await self.taken(wanted, image_mode)
        except (MediaError, Refuse):
            metrics.IMAGES.labels("refused").inc()
            raise

    async def taken(self, wanted: Wanted, image_mode: str | None) -> Any:
        """The image, within its bounds. Raises MediaError, or a hook's Refuse, with its position and the reason."""
        profile = launched_profile()
        media = ImageMediaIO(**({"image_mode": image_mode} | self.media_io_kwargs.get("image", {})))
        try:
            image = await self.opened(wanted, media)
        except TimeoutError:
            raise refusal(wanted, f"was not fetched within {profile.image_timeout:g} s") from None
        width, height = image.size
        try:
            visual_tokens(height, width, profile.min_visual_tokens, profile.max_visual_tokens)
            new_height, new_width = resized(height, width, wanted.least, wanted.most)
        except ValueError as error:
            raise refusal(wanted, f"cannot be used: {error}") from None
        if (wanted.least, wanted.most) != (profile.min_visual_tokens, profile.max_visual_tokens):
            # A plain image: vLLM would know one with its bytes again, and serve it in another request's size.
            pixels = getattr(image, "media", image)
            resize = partial(pixels.resize, (new_width, new_height), Image.Resampling.BICUBIC)
            # Not asyncio's own threads, where the lookup of a name can wait for long.
            image = await asyncio.get_running_loop().run_in_executor(global_thread_pool, resize)
            metrics.IMAGES.labels("resized").inc()
        else:
            metrics.IMAGES.labels("taken").inc()
        tokens = new_height * new_width // TOKEN_PX**2
        metrics.VISUAL_TOKENS.inc(tokens)
        if context := CONTEXT.get():
            context.images[wanted.index] = ImageInfo(width, height, tokens)
            try:
                await context.state["chain"].on_image(context, wanted.index, getattr(image, "media", image))
            except Refuse as refused:
                raise Refuse(str(refusal(wanted, refused.message)), refused.status) from None
        return image

    async def opened(self, wanted: Wanted, media: ImageMediaIO) -> Any:
        """The decoded image at an address: data, http(s), or a file below --allowed-image-dir."""
        profile, url = launched_profile(), wanted.url
        loop = asyncio.get_running_loop()
        scheme = url.partition(":")[0].lower()
        try:
            if scheme == "file":
                if profile.allowed_image_dir is None:
                    raise refusal(wanted, "is a local file, and this server reads none (--allowed-image-dir)")
                return await self.load_from_url_async(url, BoundedFiles(media))
            if scheme == "data":
                content = await loop.run_in_executor(global_thread_pool, decoded, url, profile.max_image_bytes)
            else:
                allowed = frozenset(names((profile.allowed_image_hosts or "").lower()))
                async with asyncio.timeout(profile.image_timeout):  # decoding waits for other requests', not for them
                    content = await fetch(url, allowed=allowed, most_bytes=profile.max_image_bytes)
            return await loop.run_in_executor(global_thread_pool, loaded, media, content, profile.max_image_pixels)
        except (MediaError, TimeoutError):
            raise
        except FetchError as error:
            told = NO_FILE if scheme == "file" and str(error).startswith("cannot be read") else str(error)
            raise refusal(wanted, told) from None
        except Exception as error:
            if scheme == "file":
                raise refusal(wanted, NO_FILE) from None
            reason = error.args[0] if isinstance(error, VLLMClientError) else error
            raise refusal(wanted, f"cannot be read: {reason}") from None

    async def fetch_video_async(self, video_url: str, **_: Any) -> Any:
        raise MediaError("video is not supported: QVQ takes images only")

    async def fetch_audio_async(self, audio_url: str) -> Any:
        raise MediaError("audio is not supported: QVQ takes images only")


class BoundedFiles:
    """In the place of vLLM's reader of images, for files: by the bounds that other images have."""

    def __init__(self, media: ImageMediaIO) -> None:
        self.media = media

    def load_file(self, path: Path) -> Any:
        """The image in a file, whose path vLLM has looked at. Raises FetchError, or Pillow's errors."""
        profile = launched_profile()
        if path.stat().st_size > profile.max_image_bytes:
            raise FetchError(f"has more than {profile.max_image_bytes} bytes")
        return loaded(self.media, path.read_bytes(), profile.max_image_pixels)


NO_FILE = "is no readable image below the server's --allowed-image-dir"
"""More would name the server's directories, or tell what else is there."""
MOST_SCANS = 64
"""Of a JPEG; cameras and programs write ten or so. Each is decoded over the whole image, in a thread that all share."""
MARKER = re.compile(rb"\xff([\x02-\xcf\xd8-\xfe])")
"""Of a JPEG's segment. FF 00 is a byte of a scan, FF D0 to D7 begin it anew, and FF 01 is nothing, with no length."""
END, SCAN, START = b"\xd9", b"\xda", b"\xd8"
MOST_SEGMENTS = 10_000
Image.init()
FORMATS = [
    name for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM") if name in Image.OPEN
]
"""What Pillow is asked to read: not ICO and ICNS, which it decodes before their size can be looked at."""


def decoded(url: str, most_bytes: int) -> bytes:
    """The bytes of a data URL. Raises FetchError."""
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise FetchError("cannot be read: a data URL must be data:image/...;base64,...")
    if len(data) * 3 // 4 - data[-2:].count("=") > most_bytes:
        raise FetchError(f"has more than {most_bytes} bytes")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise FetchError("cannot be read: its data is no base64") from None


def scans_of(content: bytes) -> int:
    """Scans of a JPEG up to its end, behind which phones put a film; one more than it may have, where none comes."""
    at = found = 0
    for _ in range(MOST_SEGMENTS):
        if not (marker := MARKER.search(content, at)) or marker[1] == END:
            return found
        found += marker[1] == SCAN
        at = marker.end() + (0 if marker[1] == START else int.from_bytes(content[marker.end() : marker.end() + 2]))
    return MOST_SCANS + 1


def loaded(media: ImageMediaIO, content: bytes, most_pixels: int) -> Any:
    """The image in some bytes, its size looked at before it is decoded. Raises FetchError, or Pillow's errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(content), formats=tuple(FORMATS)) as image:
                width, height = image.size
                mode = image.mode
                clear = mode == "RGB" and "transparency" in image.info
                scans = scans_of(content) if image.format in ("JPEG", "MPO") else 0
        except UnidentifiedImageError:
            raise FetchError("cannot be read: it is no image of a kind that is known here") from None
    if width * height > most_pixels:
        raise FetchError(f"has {width}x{height} px, above the {most_pixels} that this server decodes")
    if scans > MOST_SCANS:
        raise FetchError(f"has {scans} scans, above the {MOST_SCANS} that this server decodes; save it anew")
    if mode.startswith("I") or mode == "F":  # Pillow cuts these off at 255: a white picture
        raise FetchError(f"has the mode {mode}, more than 8 bits a channel; save it with 8")
    if clear:  # a colour that stands for nothing: vLLM lays all other kinds of transparency on white
        with Image.open(io.BytesIO(content)) as image, io.BytesIO() as changed:
            image.convert("RGBA").save(changed, "PNG", compress_level=1, exif=image.getexif())
            content = changed.getvalue()
    return media.load_bytes(content)


class MediaError(VLLMValidationError):  # type: ignore[misc]
    """A refusal as OpenAI's API has it: status 400, and the field in `param` alone (vLLM repeats it in the message)."""

    def __init__(self, message: str) -> None:
        super().__init__(message, parameter="messages")

    def __str__(self) -> str:
        return str(self.args[0])


def refusal(wanted: Wanted, reason: str) -> MediaError:
    """The refusal of one image, with its position and its address, shortened."""
    shown = wanted.url if len(wanted.url) <= SHOWN else wanted.url[:SHOWN] + "..."
    return MediaError(f"image {wanted.index + 1} of {wanted.total or 1} ('{shown}') {reason}")
