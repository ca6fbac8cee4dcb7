//! The plot: what puter costs where the peer costs 1, on a logarithmic scale.

use std::fmt::Write as _;

use super::{Figure, short};
use crate::demo::picture::escape;

/// Widths and heights in pixels.
const LABELS: f64 = 380.0;
const BARS: f64 = 420.0;
const MARGIN: f64 = 70.0;
const ROW: f64 = 22.0;
const TOP: f64 = 50.0;
/// The scale's ends: a hundredth of the peer's cost, and four times it.
const LEAST: f64 = 0.01;
const MOST: f64 = 4.0;
const TICKS: [f64; 6] = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0];

fn place(cost: f64) -> f64 {
    let part = (cost.clamp(LEAST, MOST) / LEAST).ln() / (MOST / LEAST).ln();
    LABELS + BARS * part
}

/// The figures that have a peer, as bars; a bar ends left of the line at 1 where puter costs less. A triangle is a goal.
pub(super) fn svg(figures: &[Figure]) -> String {
    let rows: Vec<(&Figure, f64)> = figures.iter().filter_map(|figure| Some((figure, figure.cost()?))).collect();
    let (width, bottom) = (LABELS + BARS + MARGIN, TOP + ROW * rows.len() as f64);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<style>text {{ fill: #222 }} .grid {{ stroke: #ccc }} .one {{ stroke: #222 }} \
         @media (prefers-color-scheme: dark) {{ text {{ fill: #ddd }} .grid {{ stroke: #444 }} .one {{ stroke: #ddd }} }}\
         </style>\n<title>What puter costs where its peer costs 1</title>\n\
         <text x=\"8\" y=\"20\" font-size=\"14\" font-weight=\"bold\">What puter costs where its peer costs 1 (less is \
         better)</text>\n",
        bottom + 10.0
    );
    for tick in TICKS {
        let (x, class) = (place(tick), if tick == 1.0 { "one" } else { "grid" });
        let _ = writeln!(
            text,
            "<line class=\"{class}\" x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{bottom}\"/>\
             <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{tick}</text>",
            TOP - 6.0
        );
    }
    for (row, (figure, cost)) in rows.into_iter().enumerate() {
        let y = TOP + ROW * row as f64;
        let peer = figure.peer.as_ref().map_or("", |peer| peer.name.as_str());
        let label = escape(&format!("{} / {peer}", figure.what));
        let colour = if cost < 1.0 { "#2a9d6f" } else { "#d1603d" };
        let end = place(cost);
        let _ = writeln!(
            text,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>\
             <rect x=\"{LABELS}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            LABELS - 8.0,
            y + 15.0,
            y + 4.0,
            (end - LABELS).max(1.0),
            ROW - 8.0,
            end + 4.0,
            y + 15.0,
            short(cost)
        );
        if let Some(goal) = figure.goal {
            let x = place(if figure.more { 1.0 / goal } else { goal });
            let (left, right, tip) = (x - 4.0, x + 4.0, y + 10.0);
            let _ =
                writeln!(text, "<path class=\"one\" d=\"M{left:.1} {y:.1} L{right:.1} {y:.1} L{x:.1} {tip:.1} Z\"/>");
        }
    }
    text + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::super::tests::figures;
    use super::*;

    #[test]
    fn a_bar_for_each_peer_ends_where_its_cost_is() {
        let text = svg(&figures());
        assert_eq!((text.matches("<rect").count(), text.matches("<path").count()), (2, 2), "{text}");
        assert!(text.contains("a TAP &lt;made&gt; / ip &amp; nft"));
        assert!(place(1.0) > place(0.3) && (place(MOST) - LABELS - BARS).abs() < 1e-9);
        assert_eq!((place(0.0), place(99.0)), (place(LEAST), place(MOST)));
    }
}
