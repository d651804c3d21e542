"""An audit as one HTML file that needs nothing else: facts, figures as inline PNG, and the table of states.

Test: pytest tests/test_audit.py
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart
TASK_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
SUCCESS_COLOURS = {True: "#009E73", False: "#D55E00"}
DEMONSTRATED = "#BBBBBB"
LEAST_KL = 1e-3  # nats; less is drawn as this on a logarithmic axis
BINS = 12  # of an episode's steps
STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222 }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% } th, td { padding: .3rem .6rem; text-align: left; vertical-align: top }
th { border-bottom: 2px solid #888; position: sticky; top: 0; background: #fff } td { border-bottom: 1px solid #ddd }
td.n { text-align: right; font-variant-numeric: tabular-nums } img { max-width: 100% } .facts { width: auto }
"""


def page(
    title: str, facts: Mapping[str, str], figures: Sequence[tuple[str, bytes]], columns: Sequence[str], rows: Any
) -> str:
    """Return the whole file.

    Args:
        title: its heading.
        facts: names and what they are.
        figures: what each shows, and its PNG.
        columns: of the table.
        rows: of cells; numbers are shown with three digits, None as a dash.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", "<table class='facts'>"]
    parts += [f"<tr><td>{html.escape(name)}</td><td>{html.escape(said)}</td></tr>" for name, said in facts.items()]
    parts.append("</table>")
    for caption, png in figures:
        content = base64.b64encode(png).decode("ascii")
        parts.append(
            f"<h2>{html.escape(caption)}</h2><img alt='{html.escape(caption, quote=True)}' "
            f"src='data:image/png;base64,{content}'>"
        )
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    parts.append(f"<h2>The sampled states</h2><table><thead><tr>{head}</tr></thead><tbody>")
    parts += ["<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows]
    parts.append("</tbody></table>")
    body = "\n".join(parts)
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _cell(value: Any) -> str:
    if isinstance(value, int | float):
        return f"<td class='n'>{value:.3g}</td>"
    return f"<td>{'-' if value is None else html.escape(str(value))}</td>"


def draw_kl(
    step: np.ndarray, kl_nats: np.ndarray, trust: np.ndarray | None, task_id: np.ndarray, tasks: Sequence[str]
) -> bytes:
    """Draw the KL [n] of each state against its step [n], with means over parts of the episode, and against trust."""
    figure, axes = _figure(1 if trust is None else 2)
    kl_nats = np.maximum(kl_nats, LEAST_KL)
    edges = np.linspace(0, step.max() + 1, BINS + 1)
    for k, task in enumerate(tasks):
        mine = task_id == k
        if not mine.any():
            continue
        colour = TASK_COLOURS[k % len(TASK_COLOURS)]
        axes[0].scatter(step[mine], kl_nats[mine], s=8, alpha=0.4, color=colour, linewidths=0)
        part = np.digitize(step[mine], edges) - 1
        used = np.unique(part)
        means = [kl_nats[mine][part == p].mean() for p in used]
        axes[0].plot(
            (edges[used] + edges[used + 1]) / 2, means, color=colour, label=task, linewidth=1.8, marker="o", ms=3
        )
        if trust is not None:
            axes[1].scatter(trust[mine], kl_nats[mine], s=8, alpha=0.5, color=colour, linewidths=0, label=task)
    for axis, x_label in zip(axes, ("step of the episode", "trust in the prior"), strict=False):
        axis.set_xlabel(x_label)
        axis.set_ylabel("KL, nats")
        axis.set_yscale("log")
    if trust is not None:
        axes[1].set_xlim(-0.03, 1.03)
    axes[0].legend(frameon=False, fontsize="small")
    return _png(figure)


def draw_latents(
    places: np.ndarray,
    demonstrated: np.ndarray | None,
    explained: float,
    task_id: np.ndarray,
    tasks: Sequence[str],
    success: np.ndarray,
) -> bytes:
    """Draw latents [n, 2] twice, coloured by task [n] and by success [n] bool, the demonstrated ones [K, 2] in grey."""
    figure, axes = _figure(2)
    named = [(task, task_id == k, TASK_COLOURS[k % len(TASK_COLOURS)]) for k, task in enumerate(tasks)]
    solved = [("episode solved", success, SUCCESS_COLOURS[True]), ("not solved", ~success, SUCCESS_COLOURS[False])]
    for axis, groups, title in zip(axes, (named, solved), ("by task", "by success"), strict=True):
        if demonstrated is not None:
            axis.scatter(
                demonstrated[:, 0], demonstrated[:, 1], s=7, color=DEMONSTRATED, linewidths=0, label="demonstrated"
            )
        for label, mine, colour in groups:
            if mine.any():
                axis.scatter(places[mine, 0], places[mine, 1], s=11, alpha=0.7, color=colour, linewidths=0, label=label)
        axis.set_title(title, fontsize="medium")
        axis.legend(frameon=False, fontsize="small", markerscale=1.6)
    figure.supxlabel(f"first and second principal component, {explained:.0%} of the variance", fontsize="small")
    return _png(figure)


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.4 * panels, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False).flat)
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()
