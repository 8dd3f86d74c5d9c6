"""The words by which QVQ ends its reasoning; it has no <think> tags."""

import re

# The closing ** is left to the answer's lead: the tokenizer joins it with what follows. Of the Chinese words only
# headings and those with a colon are markers: in running prose they are common ("to get the final answer, we ...").
MARKERS = (
    "**Final Answer", "**Final answer", "### Final Answer", "## Final Answer", "# Final Answer",
    "**最终答案", "### 最终答案", "## 最终答案", "# 最终答案", "最终答案：", "最终答案:",
)  # fmt: skip
"""Each ends the reasoning, the first one wins."""
BOLD = tuple(marker for marker in MARKERS if marker.startswith("**"))
COLONS = tuple(marker for marker in MARKERS if marker.endswith((":", "：")))
GRAMMARS_LEAD = "**\n\n"
"""What a grammar writes between the first of them and its answer."""
ENDED = re.compile("|".join(re.escape(marker) for marker in MARKERS))
BOLD_LEAD = re.compile(r"(?:s?[:：]?\*\*\s*[:：]?|s?[:：])?\s*")
LEAD = re.compile(r"(?:s?[:：])?\s*")
"""What of a marker stands before the answer: **, :**, a colon, line ends; of one without bold, bold is the answer's."""
MAYBE_LEAD = re.compile(r"s?[\s*:：]*")
