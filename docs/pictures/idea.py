"""Draw the idea of lookahead sparse attention: `python docs/pictures/idea.py` writes idea.svg beside it."""

from pathlib import Path

HERE = Path(__file__).parent
WIDTH, HEIGHT = 860, 372
CHUNKS, SIZE, STEP, LEFT = 26, 21, 26, 42
PROTECTED, FETCHED, STAYS = {0, 24, 25}, {7, 15}, {3, 11, 20}
STYLE = """
text { font: 14px -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; fill: var(--ink) }
.small { font-size: 12.5px; fill: var(--soft) }
.bold { font-weight: 600 }
.box { fill: none; stroke: var(--soft); stroke-width: 1.4 }
.line { fill: none; stroke: var(--soft); stroke-width: 1.6 }
.waits { fill: var(--waits); stroke: var(--edge) }
.protected { fill: var(--protected) }
.stays { fill: var(--stays) }
.fetched { fill: var(--fetched) }
.model { fill: var(--panel); stroke: var(--soft); stroke-width: 1.4 }
:root { --ink: #1f2328; --soft: #59636e; --edge: #afb8c1; --waits: #eaeef2; --protected: #6e7781; --stays: #1f6feb;
  --fetched: #e3822b; --panel: #ffffff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --edge: #57606a; --waits: #2a313c; --protected: #8b949e; --stays: #4493f8;
    --fetched: #f0964a; --panel: #161b22 }
}
"""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """A line of words with its baseline at (x, y)."""
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def square(x: float, y: float, kind: str) -> str:
    """One chunk."""
    return f'<rect x="{x}" y="{y}" width="{SIZE}" height="{SIZE}" rx="3" class="{kind}"/>'


def box(x: float, y: float, width: float, height: float, kind: str = "box") -> str:
    """A frame."""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" class="{kind}"/>'


def arrow(path: str) -> str:
    """A line with a head at its end."""
    return f'<path d="{path}" class="line" marker-end="url(#head)"/>'


def kind_of(chunk: int) -> str:
    """What becomes of a chunk in the picture."""
    for kind, chunks in (("protected", PROTECTED), ("stays", STAYS), ("fetched", FETCHED)):
        if chunk in chunks:
            return kind
    return "waits"


def history() -> list[str]:
    """Top: the whole history in chunks, then the 64 tokens to come."""
    parts = [text(LEFT, 30, "The history, in chunks of a few tokens", "bold")]
    parts += [square(LEFT + STEP * chunk, 44, kind_of(chunk)) for chunk in range(CHUNKS)]
    end = LEFT + STEP * CHUNKS
    parts += [text(end + 8, 30, "next 64 tokens", "bold")]
    parts += [f'<rect x="{end + 8 + 7 * place}" y="44" width="5" height="{SIZE}" rx="1.5" class="box"/>'
              for place in range(13)]  # fmt: skip
    return parts


def indexer() -> list[str]:
    """Middle: one token's hidden state goes in, names of chunks come out."""
    newest = LEFT + STEP * CHUNKS - 10
    return [
        box(322, 118, 216, 52, "model"),
        text(430, 140, "memory indexer", "bold", "middle"),
        text(430, 158, "a few MB, once every 64 tokens", "small", "middle"),
        arrow(f"M {newest} 70 V 144 H 546"),
        text(554, 136, "hidden state of the", "small"),
        text(554, 162, "newest token", "small"),
        arrow("M 430 170 V 206"),
        text(440, 192, "names what the next 64 tokens will read", "small"),
    ]


def memories() -> list[str]:
    """Bottom: the resident chunks on the GPU, all others in host memory, and the way between them."""
    resident = sorted(PROTECTED | STAYS | FETCHED)
    parts = [box(LEFT - 12, 214, 340, 86), text(LEFT, 236, "GPU memory: what attention reads", "bold")]
    parts += [square(LEFT + STEP * place, 254, kind_of(chunk)) for place, chunk in enumerate(resident)]
    parts += [box(480, 214, 350, 86), text(492, 236, "Host memory: what waits", "bold")]
    parts += [square(492 + STEP * place, 254, "waits") for place in range(12)]
    parts += [text(492 + STEP * 12 + 2, 270, "…", "small")]
    parts += [arrow("M 478 250 H 374"), text(425, 243, "fetched", "small", "middle")]
    parts += [arrow("M 372 276 H 476"), text(425, 294, "evicted", "small", "middle")]
    return parts


def legend() -> list[str]:
    """What the colours mean."""
    parts, x = [], LEFT
    for kind, words, width in (
        ("protected", "protected: the first and the newest", 262),
        ("stays", "stays", 78),
        ("fetched", "fetched now", 120),
        ("waits", "waits until it is named again", 200),
    ):
        parts += [square(x, 324, kind), text(x + SIZE + 7, 340, words, "small")]
        x += width
    return parts


def picture() -> str:
    """The SVG."""
    head = (
        '<defs><marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse"><path d="M 0 1 L 9 5 L 0 9 z" style="fill: var(--soft)"/></marker></defs>'
    )
    said = (
        "A history is cut into chunks. Every 64 tokens a memory indexer reads the hidden state of the newest token and "
        "names the chunks that the next 64 tokens will read. Those stay on the GPU or are fetched; the rest waits in "
        "host memory. The first and the newest chunks are always resident."
    )
    parts = [head, f"<title>{said}</title>", *history(), *indexer(), *memories(), *legend()]
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}>', f"<style>{STYLE}</style>", *parts, "</svg>"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (HERE / "idea.svg").write_text(picture(), encoding="utf-8")
