"""Visual tokens <-> pixels, by the rule that vLLM runs: Hugging Face's `smart_resize` for Qwen2-VL.

One visual token covers 28 x 28 px: patches of 14 px, merged 2 x 2. qwen_vl_utils carries a rule of its own that
differs on thin images (README, "Images"); the server never runs it.
"""

import math

TOKEN_PX = 28
"""Side, in pixels, of the square that one visual token covers."""
MAX_ASPECT_RATIO = 200
"""Hugging Face refuses an image whose longer side is more than this many times the shorter one."""


def pixels(visual_tokens: int) -> int:
    """The pixels that a number of visual tokens covers: 1280 -> 1003520."""
    return visual_tokens * TOKEN_PX * TOKEN_PX


def resized(height: int, width: int, min_visual_tokens: int, max_visual_tokens: int) -> tuple[int, int]:
    """(height, width) in pixels, multiples of 28, to which an image of `height` x `width` px is brought.

    Source: transformers 5.19, models/qwen2_vl/image_processing_qwen2_vl.py, `smart_resize`.
    Raises ValueError where Hugging Face refuses the shape, and where the result would still be above the maximum
    (a thin image cannot be less than one token high).
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image of {width}x{height} px has no pixels")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(
            f"an image of {width}x{height} px is more than {MAX_ASPECT_RATIO} times as long as it is wide, "
            "which the model's processor refuses; crop it, or pad its short side"
        )
    least, most = pixels(min_visual_tokens), pixels(max_visual_tokens)
    new_height, new_width = (round(side / TOKEN_PX) * TOKEN_PX for side in (height, width))
    if new_height * new_width > most:
        shrink = math.sqrt(height * width / most)
        new_height, new_width = (
            max(TOKEN_PX, math.floor(side / shrink / TOKEN_PX) * TOKEN_PX) for side in (height, width)
        )
    elif new_height * new_width < least:
        grow = math.sqrt(least / (height * width))
        new_height, new_width = (math.ceil(side * grow / TOKEN_PX) * TOKEN_PX for side in (height, width))
    if new_height * new_width > most:
        raise ValueError(
            f"an image of {width}x{height} px would take {new_height * new_width // TOKEN_PX**2} visual tokens, "
            f"above the maximum of {max_visual_tokens}: it is too thin to be resized further; crop it, or pad its "
            "short side"
        )
    return new_height, new_width


def visual_tokens(height: int, width: int, min_visual_tokens: int, max_visual_tokens: int) -> int:
    """Visual tokens of an image of `height` x `width` px: 1092 x 1456 within 4 to 16384 -> 39 * 52 = 2028.

    Raises ValueError as `resized` does.
    """
    new_height, new_width = resized(height, width, min_visual_tokens, max_visual_tokens)
    return new_height * new_width // TOKEN_PX**2
