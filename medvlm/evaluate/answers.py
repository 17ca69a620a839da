"""What an answer says: normal forms of free text, and strict readers of yes or no and of chosen options.

The readers never guess. What they cannot read is None, and whoever scores counts that as wrong.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

ARTICLES = frozenset(("a", "an", "the"))

YES_NO = {
    "yes": "yes", "no": "no",
    "是": "yes", "是的": "yes", "对": "yes", "对的": "yes", "有": "yes", "包含": "yes", "包括": "yes", "存在": "yes", "可以": "yes", "能": "yes", "会": "yes",
    "否": "no", "不是": "no", "不": "no", "不对": "no", "没有": "no", "无": "no", "不包含": "no", "不包括": "no", "不存在": "no", "不可以": "no", "不能": "no",
    "不会": "no",
}  # fmt: skip
"""{what a whole answer may be: what it says}; the Chinese words are those of SLAKE's closed questions.

Source: BoKelvin/SLAKE (answers); EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/slake/utils.py (synonyms). 正常 and 异常 are left
out: whether "normal" means yes depends on the question.
"""


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles (unless nothing else is left), single spaces.

    >>> normalise("Yes, the LEFT lung.")
    'yes left lung'
    >>> normalise("A")
    'a'
    """
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join([w for w in words if w not in ARTICLES] or words)


_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = dict(zip("none zero one two three four five six seven eight nine ten".split(), "0 0 1 2 3 4 5 6 7 8 9 10".split()))
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's "
    "isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've "
    "should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd "
    "something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've "
    "wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)


@lru_cache(maxsize=1)
def _spelled() -> dict[str, str]:
    """{contraction with one of its apostrophes left out: the contraction}."""
    return {w[:i] + w[i + 1 :]: w for w in _CONTRACTIONS.split() for i, c in enumerate(w) if c == "'"}


def vqa_normalise(text: str) -> str:
    """The normal form of the VQA challenge: punctuation, lower case, number words, articles, contractions.

    A mark is taken out where it stands beside a space anywhere in the text, or where the text has a comma between digits; else
    it becomes a space. A full stop goes unless a digit follows.

    Source: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py (the marks of its second version).

    >>> vqa_normalise("There are two X-rays, dont you see?")
    "there are 2 x rays don't you see"
    """
    text = " ".join(text.split())
    out, number = text, re.search(r"\d,\d", text)
    for mark in _MARKS:
        out = out.replace(mark, "" if number or f"{mark} " in text or f" {mark}" in text else " ")
    words = [_DIGITS.get(w, w) for w in re.sub(r"\.(?!\d)", "", out).lower().split()]
    return " ".join(_spelled().get(w, w) for w in words if w not in ARTICLES)


_SLAKE_YES = frozenset(("yes", "yeah", "yep", "true", "是", "是的", "有", "包含", "可以", "能", "会", "正常"))
_SLAKE_NO = frozenset(("no", "nope", "false", "否", "不是", "没有", "无", "不包含", "不能", "不会", "不可以", "不正常", "异常"))


def slake_normalise(text: str) -> str:
    """Lower case, nothing in parentheses, no punctuation, "x ray" as "xray", and words for yes and no, in English and Chinese, as one.

    Source: EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/slake/utils.py.
    """
    text = _without(_without(text.lower(), "(", ")"), "（", "）")
    text = " ".join(re.sub(r"[^\w\s]|_", " ", text).split())
    text = "xray" if text == "x ray" else text
    return "yes" if text in _SLAKE_YES else "no" if text in _SLAKE_NO else text


def _without(text: str, left: str, right: str) -> str:
    """A text without what stands between the marks, in linear time."""
    kept, at = [], 0
    while (i := text.find(left, at)) >= 0 and (j := text.find(right, i)) >= 0:
        kept.append(text[at:i])
        at = j + 1
    return " ".join([*kept, text[at:]])


_THOUGHT = re.compile(r"\A.*</(?:think|thinking|thought|reasoning)>", re.S | re.I)
_CUT = re.compile(r"<(?:think|thinking|thought|reasoning)>.*", re.S | re.I)
_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.S | re.I)
_DRESS = re.compile(r"<\|?/?\w{1,20}\|?>|[*`#\"“”«»「」『』]|(?<!\w)[_'‘’]+|[_'‘’]+(?!\w)")


_LATEX = re.compile(r"\\(?:text|mathrm|mathbf|mathit|textbf|textit)\s*\{([^{}]*)\}")


def said(text: str) -> str:
    """An answer without its reasoning (``<think>``), its wrapping (``<answer>``, ``\\boxed``), markdown and quotes.

    Reasoning that never ends leaves nothing: the answer was cut off before it came.
    """
    text = _CUT.sub("", _THOUGHT.sub("", unicodedata.normalize("NFKC", text).replace("’", "'")))
    inside = boxed(text)
    text = _DRESS.sub("", inside and _LATEX.sub(r"\1", inside) or (_TAGGED.findall(text) or [text])[-1])
    return "\n".join(filter(None, (" ".join(line.split()) for line in text.splitlines())))


def boxed(text: str) -> str | None:
    """What stands in the last ``\\boxed{...}``, None without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return text[begin:i]
    return None


_LABEL = re.compile(
    r"\b(?:answer|(?:correct|right|best)\s+(?:option|choice))\b(?:\s+(?:to|for)\s+[^.:?!\n]{0,120}?)?"
    r"\s*(?:(?:is|would be|should be|must be)\b\s*:?|:|=)\s*"
    r"|答案\s*(?:是|为)?\s*:?\s*",
    re.I,
)


def _answered(text: str) -> str:
    """What follows the last "the answer is", else the whole text."""
    found = [*_LABEL.finditer(text)]
    return text[found[-1].end() :].strip() if found else text


_YES = r"(?P<yes>yes|yeah|yep|yup)\b"
_NO = (
    r"(?P<no>nope|nah|no(?=\s*$|\s*[,;:!?()\[\]}/\n。、]|\s*\.(?!\s*\d)|\s*[-–—](?!\w)|\s+[-–—]"
    r"|\s+(?:there|it|it's|this|that|these|those|they|he|she|we|i|the|its|or|and|but|because|since|not)\b))\b"
)
_WORD = re.compile(rf"\b(?:{_YES}|{_NO})", re.I)
_STATED = re.compile(rf"(?:^|\?\s+|\bsay\s+|\n)[\W_]{{0,20}}(?:{_YES}|{_NO})", re.I)
_ALONE = re.compile(r"[\W_]*$", re.M)
_DOUBT = re.compile(
    r"\bnot\s+(?:\w+\s+)?(?:sure|certain)\b|\b(?:unsure|it depends|as an ai|i'?m an ai|i am an ai)\b|\bdo(?: not|n't) know\b"
    r"|\b(?:is|it's|but|remains)\s+(?:\w+\s+)?(?:unclear|uncertain)\b"
    r"|\b(?:cannot|can't|can not|could not|couldn't|unable to|not able to|not possible to|impossible to|difficult to|hard to)\s+(?:\w+\s+){0,2}?"
    r"(?:say|tell|determined?|answer(?:ed)?|know|provide|help|assist|diagnose|interpret|give"
    r"|(?:see|view|access|open|process|analy[sz]e)\s+(?:\w+\s+)?"
    r"(?:image|picture|scan|photo)s?)\b|\bno\s+image\b[^.\n]{0,20}\b(?:provided|attached|given|available|shown|uploaded)\b",
    re.I,
)
_SOFT = re.compile(r"\s*\?|[\W_]*(?:but\s+)?(?:maybe|perhaps|possibly|probably|might be|i guess)\b", re.I)


def yes_no(text: str) -> str | None:
    """ "yes" or "no" where an answer says so, else None: hedges, refusals, both at once, and a "no" that only belongs to a noun.

    The word must open the answer, follow "the answer is" or an echoed question, or stand alone on a line; in Chinese the first
    clause must be one of ``YES_NO``. "There is no effusion" is None: a determiner is not an answer.

    >>> yes_no("Yes. No effusion."), yes_no("no, there is not"), yes_no("Nodule"), yes_no("Yes or no")
    ('yes', 'no', None, None)
    """
    text = re.sub(r"(^|\? ?|\n)(?:A|Assistant|Response)\s*:", r"\1 ", said(text), flags=re.I).strip()
    clauses = [c for c in re.split(r"[\s,.;:!?/。、]+", _answered(text)) if c]
    if clauses and clauses[0] in YES_NO and not clauses[0].isascii():
        meant = {YES_NO[c] for c in clauses if c in YES_NO}
        return meant.pop() if len(meant) == 1 else None
    words = {m.lastgroup for m in _WORD.finditer(text)}
    if len(words) != 1 or _DOUBT.search(text):
        return None
    for part in dict.fromkeys((_answered(text), text)):
        for m in _STATED.finditer(part):
            inside = m.group().startswith("\n")  # a line of its own; one that goes on is prose
            if not _SOFT.match(part, m.end()) and (not inside or _ALONE.match(part, m.end())):
                return m.lastgroup
    return None


_LETTER = re.compile(
    r"[\s(\[]*(?:(?:option|choice)\s+)?[(\[]?([A-Za-z])[)\]]?"
    r"(?:\s*[.):,]\s*|\s*\n|\s*$|\s+[-–—]\s+|\s+(?=(?:is|because|since)\b))",
    re.I,
)
_ITEM = re.compile(r"(?:^|[\n,;]|\band\b)\s*(?:and\s+)?[(\[]?([A-Za-z])(?:[)\]][.:]?|[.:])(?:\s+|$)", re.I)
_LIST = re.compile(
    r"(?:(?:options?|choices?)\s+)?[(\[]?[A-Za-z][)\]]?"
    r"(?:(?:\s*[,;/&+]\s*(?:and\s+)?|\s+and\s+|\s+)[(\[]?[A-Za-z][)\]]?)*\s*\.?",
    re.I,
)


def _plain(choices: Sequence[str]) -> list[str]:
    """Normal forms of the choices, without letters that only number them ("A. lung")."""
    numbered = all(re.match(rf"\s*[(\[]?{chr(65 + i)}[.):\]]+\s*\S", c) for i, c in enumerate(choices))
    return [normalise(re.sub(r"^\s*[(\[]?[A-Z][.):\]]+\s*", "", c) if numbered else c) for c in choices]


def _exactly(text: str, plain: Sequence[str]) -> int | None:
    """The one choice whose normal form a text is; what begins with "A." is a letter and its text, not an article."""
    form = "" if re.match(r"\s*[(\[]?a\s*[).:\]]", text, re.I) else normalise(text)
    return plain.index(form) if plain.count(form) == 1 else None


def pick_choice(text: str, choices: Sequence[str]) -> int | None:
    """Index of the one choice that an answer names, None where it names none or several.

    By its letter ("B", "(B)", "B.", "Answer: B", "B) text") or by its own words, after :func:`normalise`, as the whole answer,
    its first clause or its last line. A letter whose text is that of another choice is None.
    """
    plain, answer = _plain(choices), _answered(said(text))
    if len(pick_choices(text, choices) or ()) > 1:
        return None
    if (whole := _exactly(answer, plain)) is not None:
        return whole
    if (m := _LETTER.match(answer)) and (i := ord(m[1].upper()) - 65) < len(plain):
        rest = answer[m.end() :]
        more = _LETTER.match(re.sub(r"^(?:and|or|[&/,])\s*", "", rest)) if rest.strip() else None
        return None if more or _exactly(rest, plain) not in (None, i) else i
    parts = (re.split(r"[\n.;]|,\s", answer, maxsplit=1)[0], answer.rpartition("\n")[2])
    found = {i for p in parts if (i := _exactly(p, plain)) is not None}
    if not found and (word := yes_no(text)) in plain:
        return plain.index(word)
    return found.pop() if len(found) == 1 else None


def pick_choices(text: str, choices: Sequence[str]) -> frozenset[int] | None:
    """Indices of all choices that an answer names ("A, C", "A and C", "AC", "A. text; C. text", their words), None where any part of it
    is no choice.
    """
    plain, answer = _plain(choices), _answered(said(text))
    whole, letters = _exactly(answer, plain), []
    if _LIST.fullmatch(answer) or re.fullmatch(r"[A-Z]{2,}\.?", answer) and len(set(answer)) == len(answer):
        letters = [ord(c.upper()) - 65 for c in re.sub(r"(?i)^(?:options?|choices?)\s+|\band\b", " ", answer) if c.isalpha()]
    if whole is not None and not (len(letters) > 1 and {normalise(c) for c in answer if c.isalpha()} <= set(plain)):
        return frozenset((whole,))  # "CT", unless "C" and "T" are choices too
    if letters:
        return frozenset(letters) if max(letters) < len(plain) else None
    items = [*_ITEM.finditer(answer)]
    if items and not items[0].start():
        ends = [*(m.start() for m in items[1:]), len(answer)]
        named = [(ord(m[1].upper()) - 65, normalise(answer[m.end() : end])) for m, end in zip(items, ends)]
        return frozenset(i for i, _ in named) if all(i < len(plain) and words in ("", plain[i]) for i, words in named) else None
    for split in (r"[;\n]", r"[;,\n]|\band\b"):
        parts = [_exactly(p, plain) for p in re.split(split, answer) if normalise(p)]
        if parts and None not in parts:
            return frozenset(parts)
    return None


def probmed_match(response: str, answer: str) -> bool:
    """Whether ProbMed's published scorer takes a response as right; answer: "yes", anything else stands for no.

    A transcription, defects included: capital "Yes" or "No" anywhere ("Nodule" is a no, "Yes or No" is both), else the word alone.
    Source: eric-ai-lab/ProbMed, eval/calculate_score.py, get_score_binary.
    """
    word, response = ("Yes" if answer == "yes" else "No"), response.strip()
    return word in response or response.lower() in (word.lower(), f"{word.lower()}.")
