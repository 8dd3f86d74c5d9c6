"""Each image of a request: fetched in time, decodable, of a shape that the model can take; else a clear 400."""

import asyncio
from typing import Any

from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.multimodal.media.connector import MediaConnector

from qvq_serve.engine import launched_profile
from qvq_serve.visual import visual_tokens

SHOWN = 80
"""Characters of an image's address that an error shows; a data URL can have millions."""


class ImageConnector(MediaConnector):  # type: ignore[misc]
    """vLLM's connector, with the launch's limits, and with the errors of all its ways to fail made the client's."""

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        profile = launched_profile()
        is_file = image_url[:5].lower() == "file:"
        if is_file and profile.allowed_image_dir is None:
            raise refusal(image_url, "is a local file, and this server reads none (--allowed-image-dir)")
        try:
            async with asyncio.timeout(profile.image_timeout):
                image = await super().fetch_image_async(image_url, image_mode=image_mode)
        except TimeoutError:
            raise refusal(image_url, f"was not fetched within {profile.image_timeout:g} s") from None
        except Exception as error:
            if is_file:  # the reason would name the server's directories
                raise refusal(image_url, "is no readable image below the server's --allowed-image-dir") from None
            reason = error.args[0] if isinstance(error, VLLMClientError) else error
            raise refusal(image_url, f"cannot be read: {reason}") from None
        width, height = image.size
        try:
            visual_tokens(height, width, profile.min_visual_tokens, profile.max_visual_tokens)
        except ValueError as error:
            raise refusal(image_url, f"cannot be used: {error}") from None
        return image

    async def fetch_video_async(self, video_url: str, **_: Any) -> Any:
        raise MediaError("video is not supported: QVQ takes images only")

    async def fetch_audio_async(self, audio_url: str) -> Any:
        raise MediaError("audio is not supported: QVQ takes images only")


class MediaError(VLLMValidationError):  # type: ignore[misc]
    """A refusal as OpenAI's API has it: status 400, and the field in `param` alone (vLLM repeats it in the message)."""

    def __init__(self, message: str) -> None:
        super().__init__(message, parameter="messages")

    def __str__(self) -> str:
        return str(self.args[0])


def refusal(image_url: str, reason: str) -> MediaError:
    """The refusal of one image, with its address, shortened."""
    shown = image_url if len(image_url) <= SHOWN else image_url[:SHOWN] + "..."
    return MediaError(f"the image '{shown}' {reason}")
