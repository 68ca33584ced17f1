"""How hard a page is to read: words of a sentence, syllables of a word, Flesch's reading ease."""

import re

FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2\s*$", re.M | re.S)
FORMULA = re.compile(r"\$\$.*?\$\$|\\\(.*?\\\)", re.S)
SNIPPET = re.compile(r"^-+8<-+.*$", re.M)
COMMENT = re.compile(r"<!--.*?-->", re.S)
TAG = re.compile(r"</?[a-zA-Z][^>]*>")
IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)(?:\{[^}]*\})?")
LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
CODE = re.compile(r"`+[^`]*`+")
ADMONITION = re.compile(r'^[!?]{3}\+? \w+(?: ".*")?$', re.M)
WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")


def prose(markdown):
    """The sentences of a page: without code, tables, formulas, headings and pictures.

    Code within a sentence counts as one word of two syllables.
    """
    text = markdown
    for pattern in (FENCE, FORMULA, SNIPPET, COMMENT, IMAGE, ADMONITION):
        text = pattern.sub("", text)
    text = LINK.sub(r"\1", text)
    text = CODE.sub("number", text)
    text = TAG.sub("", text)
    blocks = []
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text):
        lines = [
            line
            for line in paragraph.splitlines()
            if not re.match(r"\s*(#|\||\[\^)", line) and not line.startswith("    ")
        ]
        block = re.sub(r"^\s*(?:[-*:]|\d+\.)\s+", "", " ".join(lines).strip())
        if WORD.search(block):
            blocks.append(block.replace("*", "").replace("_", ""))
    found = []
    for block in blocks:
        plain = re.sub(r"\b(?:e\.g|i\.e|et al|vs|Fig|eq)\.", "eg", block)
        found += [s for s in re.split(r"(?<=[.!?])[\"')]*\s+", plain) if WORD.search(s)]
    return found


def syllables(word):
    """About how many: groups of vowels, without a silent e."""
    word = word.lower().removesuffix("'s")
    total = 0
    for part in re.split(r"[-']", word):
        part = re.sub(r"(?<=[aeiou])y(?=[aeiou])", "j", part)  # layer
        groups = len(re.findall(r"[aeiouy]+", part))
        silent = re.search(r"[^aeiouyl]e$|[^aeiouytd]ed$|[^aeiouysxzcgh]es$|[^aeiouy]ely$", part)
        if silent and groups > 1:
            groups -= 1
        groups += len(re.findall(r"(?:i(?=[aou]|en|et)|[eu]o(?=[^u])|^cre(?=a))(?<![tcsg]i)", part))
        total += max(groups, 1) if part else 0
    return max(total, 1)


def figures(markdown):
    """Words, words of a sentence, and Flesch's reading ease (100 easy, 0 hard).

    Source: Flesch (1948), A new readability yardstick.
    """
    sentences = [WORD.findall(s) for s in prose(markdown)]
    words = [word for sentence in sentences for word in sentence]
    if not words:
        return 0, 0.0, 100.0
    length = len(words) / len(sentences)
    ease = 206.835 - 1.015 * length - 84.6 * sum(map(syllables, words)) / len(words)
    return len(words), length, ease
