//! A recording as one SVG: all of it is there at once, and where animation is shown its lines come one after the other as
//! they did. No script, no font, nothing from elsewhere.

use std::fmt::Write;

use super::recording::{Recording, Scene};

/// Seconds that the animation lasts at most; a longer recording is played faster.
const LONGEST: f64 = 24.0;
const SIZE: f64 = 14.0;
/// Width of a character: of the fonts below the widest has 0.61.
const WIDTH: f64 = SIZE * 0.61;
const LINE: f64 = 20.0;
const EDGE: f64 = 22.0;
/// Characters between a command and the time that it took.
const GAP: usize = 10;

const STYLE: &str = r##"
.back { fill: #ffffff; stroke: #d1d9e0 }
text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", "Liberation Mono", monospace; fill: #1f2328; white-space: pre }
.title { fill: #0550ae }
.typed { font-weight: 700 }
.time { fill: #59636e; text-anchor: end }
.about { fill: #59636e; font-size: 12px }
@media (prefers-color-scheme: dark) {
  .back { fill: #0d1117; stroke: #3d444d }
  text { fill: #e6edf3 }
  .title { fill: #79c0ff }
  .time, .about { fill: #9198a1 }
}
@keyframes come { from { opacity: 0 } }
.come { animation: come 0.12s both }
@media (prefers-reduced-motion: reduce) { .come { animation: none } }
"##;

/// Draws these scenes of the recording.
pub fn draw(recording: &Recording, wanted: &[&str]) -> String {
    let scenes: Vec<&Scene> = recording.scenes.iter().filter(|scene| wanted.contains(&scene.title.as_str())).collect();
    let steps = || scenes.iter().flat_map(|scene| &scene.steps);
    let total: f64 = steps().map(|step| step.took()).sum();
    let speed = (total / LONGEST).ceil().max(1.0);
    let widest = steps().map(|step| {
        let lines = step.lines.iter().map(|(_, line)| line.trim_end().chars().count()).max().unwrap_or(0);
        lines.max(step.typed.chars().count() + GAP)
    });
    let columns = widest.max().unwrap_or(0).max(recording.about.chars().count() * 12 / 14);
    let right = EDGE + columns as f64 * WIDTH;

    let mut body = String::new();
    let mut y = EDGE;
    let mut put = |y: f64, class: &str, delay: f64, x: f64, text: &str| {
        let text = escape(text.trim_end());
        let style = match delay {
            0.0 => String::new(),
            delay => format!(" style=\"animation-delay: {delay:.2}s\""),
        };
        let _ = writeln!(
            body,
            "<text class=\"come{class}\"{style} x=\"{x:.0}\" y=\"{y:.0}\" xml:space=\"preserve\">{text}</text>"
        );
    };
    // Where the animation is, in seconds of the recording.
    let mut clock = 0.0;
    for (number, scene) in scenes.iter().enumerate() {
        y += if number == 0 { LINE / 2.0 } else { LINE * 1.5 };
        put(y, " title", clock / speed, EDGE, &format!("# {}", scene.title));
        for step in &scene.steps {
            let at = |time: f64| (clock + time - step.began) / speed;
            y += LINE;
            put(y, " typed", at(step.began), EDGE, &format!("$ {}", step.typed));
            put(y, " time", at(step.ended), right, &format!("{:.1} s", step.took()));
            for (time, line) in &step.lines {
                y += LINE;
                put(y, "", at(*time), EDGE, line);
            }
            clock += step.took();
        }
    }
    y += LINE * 1.5;
    let pace = match speed {
        1.0 => "shown as fast as it was".to_string(),
        speed => format!("shown {speed:.0} times as fast"),
    };
    put(y, " about", 0.0, EDGE, &recording.about);
    y += LINE;
    put(
        y,
        " about",
        0.0,
        EDGE,
        &format!("{total:.0} s of real time, {pace}; beside each command the time that it took."),
    );

    let (width, height) = (right + EDGE, y + EDGE);
    let about = escape(&recording.about);
    let size = format!("width=\"{width:.0}\" height=\"{height:.0}\" viewBox=\"0 0 {width:.0} {height:.0}\"");
    let frame = format!(
        "<rect class=\"back\" x=\"0.5\" y=\"0.5\" width=\"{:.0}\" height=\"{:.0}\" rx=\"8\"/>",
        width - 1.0,
        height - 1.0
    );
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" {size}>\n<title>A run of cargo xtask demo</title>\n\
         <desc>{about}</desc>\n<style>{STYLE}</style>\n{frame}\n{body}</svg>\n"
    )
}

/// Text as XML has it; what XML cannot hold is left out.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars().filter(|c| !c.is_control()) {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::super::recording::tests::sample;
    use super::*;

    /// The texts of a picture with the delays at which they come.
    fn texts(svg: &str) -> Vec<(f64, String)> {
        let delay = |line: &str| match line.split_once("animation-delay: ") {
            Some((_, rest)) => rest.split('s').next().unwrap().parse().unwrap(),
            None => 0.0,
        };
        let text = |line: &str| line.split_once("preserve\">").unwrap().1.strip_suffix("</text>").unwrap().to_string();
        svg.lines().filter(|line| line.starts_with("<text")).map(|line| (delay(line), text(line))).collect()
    }

    #[test]
    fn all_lines_are_there_and_come_when_they_did() {
        let svg = draw(&sample(), &["First", "Second"]);
        let found = texts(&svg);
        let words: Vec<&str> = found.iter().map(|(_, text)| text.as_str()).collect();
        let wanted = [
            "# First",
            "$ puter list",
            "0.4 s",
            "NAME  STATUS",
            "",
            "# Second",
            "$ puter ssh web 'a &lt;b&gt; &amp; c'",
            "100.0 s",
            "$ a &quot;b&quot; &lt;c&gt;",
            "On a test",
            "100 s of real time, shown 5 times as fast; beside each command the time that it took.",
        ];
        assert_eq!(words, wanted);
        // 100.4 s in at most 24: the second command begins after 0.4 s, its line comes 60 s later.
        assert_eq!(found[8].0, 12.08, "{found:?}");
        assert!(found.iter().all(|(delay, _)| *delay <= LONGEST), "{found:?}");
    }

    #[test]
    fn only_the_wanted_scenes_are_drawn() {
        let svg = draw(&sample(), &["First"]);
        assert!(svg.contains("# First") && !svg.contains("# Second"), "{svg}");
        assert!(svg.contains("shown as fast as it was"), "{svg}");
    }

    #[test]
    fn nothing_runs_and_nothing_is_fetched() {
        let svg = draw(&sample(), &["First", "Second"]);
        for word in ["<script", "href", "url(", "@import", "onload"] {
            assert!(!svg.contains(word), "{word}");
        }
    }
}
