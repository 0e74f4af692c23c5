"""A few hundred facts in two languages, and a search over them."""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import cache

from minimind.data.builtin.facts import CAPITALS

_MAX_RESULTS = 2  # facts returned by a search
# By atomic number; in ELEMENTS_ZH each character is a name.
_NAMES = """
hydrogen helium lithium beryllium boron carbon nitrogen oxygen fluorine neon sodium magnesium aluminium silicon
phosphorus sulfur chlorine argon potassium calcium scandium titanium vanadium chromium manganese iron cobalt nickel
copper zinc gallium germanium arsenic selenium bromine krypton rubidium strontium yttrium zirconium niobium molybdenum
technetium ruthenium rhodium palladium silver cadmium indium tin antimony tellurium iodine xenon caesium barium
lanthanum cerium praseodymium neodymium promethium samarium europium gadolinium terbium dysprosium holmium erbium
thulium ytterbium lutetium hafnium tantalum tungsten rhenium osmium iridium platinum gold mercury thallium lead
bismuth polonium astatine radon francium radium actinium thorium protactinium uranium
"""
ELEMENTS = tuple(_NAMES.split())
ELEMENTS_ZH = (
    "氢氦锂铍硼碳氮氧氟氖钠镁铝硅磷硫氯氩钾钙钪钛钒铬锰铁钴镍铜锌镓锗砷硒溴氪铷锶钇锆铌钼锝钌铑钯银镉铟锡锑碲碘氙铯钡镧"
    "铈镨钕钷钐铕钆铽镝钬铒铥镱镥铪钽钨铼锇铱铂金汞铊铅铋钋砹氡钫镭锕钍镤铀"
)
# English and Chinese name, height in metres
MOUNTAINS = (
    ("Mount Everest", "珠穆朗玛峰", 8849), ("K2", "乔戈里峰", 8611), ("Lhotse", "洛子峰", 8516),
    ("Makalu", "马卡鲁峰", 8485), ("Annapurna", "安纳布尔纳峰", 8091), ("Denali", "迪纳利山", 6190),
    ("Kilimanjaro", "乞力马扎罗山", 5895), ("Elbrus", "厄尔布鲁士山", 5642), ("Mont Blanc", "勃朗峰", 4806),
    ("Mount Fuji", "富士山", 3776), ("Mount Etna", "埃特纳火山", 3403), ("Zugspitze", "楚格峰", 2962),
    ("Mount Olympus", "奥林匹斯山", 2917), ("Ben Nevis", "本尼维斯山", 1345), ("Mount Tai", "泰山", 1545),
    ("Huangshan", "黄山", 1864),
)  # fmt: skip
# English and Chinese name, length in kilometres
RIVERS = (
    ("Nile", "尼罗河", 6650), ("Amazon", "亚马孙河", 6400), ("Yangtze", "长江", 6300),
    ("Mississippi", "密西西比河", 3766),
    ("Yellow River", "黄河", 5464), ("Congo", "刚果河", 4700), ("Mekong", "湄公河", 4350), ("Volga", "伏尔加河", 3530),
    ("Danube", "多瑙河", 2850), ("Indus", "印度河", 3180), ("Ganges", "恒河", 2525), ("Rhine", "莱茵河", 1233),
    ("Seine", "塞纳河", 777), ("Thames", "泰晤士河", 346), ("Loire", "卢瓦尔河", 1006), ("Elbe", "易北河", 1094),
)  # fmt: skip


@cache
def facts() -> tuple[str, ...]:
    """All facts, one sentence each."""
    sentences = []
    for number, (name, chinese) in enumerate(zip(ELEMENTS, ELEMENTS_ZH, strict=True), 1):
        sentences += [f"The atomic number of {name} is {number}.", f"{chinese}的原子序数是{number}。"]
    for name, chinese, height in MOUNTAINS:
        sentences += [f"{name} is {height} metres high.", f"{chinese}高{height}米。"]
    for name, chinese, length in RIVERS:
        sentences += [f"The {name} is {length} kilometres long.", f"{chinese}长{length}千米。"]
    for country, (capital, chinese, capital_zh) in CAPITALS.items():
        sentences += [f"The capital of {country} is {capital}.", f"{chinese}的首都是{capital_zh}。"]
    return tuple(sentences)


def search(query: str) -> str:
    """Facts about chemical elements, mountains, rivers and capitals."""
    words = Counter(_words(query))
    rarity, indexed = _index()
    scores = [sum(rarity[word] for word in words if word in fact) / math.sqrt(len(fact)) for fact in indexed]
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:_MAX_RESULTS]
    results = [facts()[i] for i in best if scores[i] > scores[best[0]] / 2]
    if not results:
        raise ValueError("nothing was found")
    return "\n".join(results)


@cache
def _index() -> tuple[dict[str, float], list[frozenset[str]]]:
    """The inverse document frequency of each word, and the words of each fact."""
    indexed = [frozenset(_words(fact)) for fact in facts()]
    counts = Counter(word for words in indexed for word in words)
    return {word: math.log(len(indexed) / count) for word, count in counts.items()}, indexed


def _words(text: str) -> list[str]:
    """Lower-case Latin words, single Chinese characters and Chinese character bigrams."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    for run in re.findall(r"[\u4e00-\u9fff]+", text):
        words += [*run, *(run[i : i + 2] for i in range(len(run) - 1))]
    return words
