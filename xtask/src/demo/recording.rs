//! A run of the demo as it was: what was typed, what came and when. It is kept as an asciicast (version 2), from which the
//! transcript and the picture are made.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

/// What is shown where a command can be typed.
const PROMPT: &str = "$ ";

/// A whole run.
#[derive(Clone, Debug, PartialEq)]
pub struct Recording {
    /// On what it ran, and when.
    pub about: String,
    /// The widest line.
    pub columns: usize,
    pub scenes: Vec<Scene>,
}

/// Some commands with a title.
#[derive(Clone, Debug, PartialEq)]
pub struct Scene {
    pub title: String,
    pub steps: Vec<Step>,
}

/// A command; times are seconds since the recording began.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    pub typed: String,
    pub began: f64,
    pub lines: Vec<(f64, String)>,
    pub ended: f64,
}

impl Step {
    /// Seconds that it took.
    pub fn took(&self) -> f64 {
        self.ended - self.began
    }
}

/// Takes notes while the demo runs.
pub struct Recorder {
    clock: Instant,
    scenes: Vec<Scene>,
}

impl Default for Recorder {
    fn default() -> Recorder {
        Recorder { clock: Instant::now(), scenes: Vec::new() }
    }
}

impl Recorder {
    fn now(&self) -> f64 {
        // No finer than it is written down.
        (self.clock.elapsed().as_secs_f64() * 1000.0).round() / 1000.0
    }

    fn step(&mut self) -> Option<&mut Step> {
        self.scenes.last_mut()?.steps.last_mut()
    }

    /// A new scene begins.
    pub fn scene(&mut self, title: &str) {
        self.scenes.push(Scene { title: title.into(), steps: Vec::new() });
    }

    /// A command begins.
    pub fn begin(&mut self, typed: &str) {
        let now = self.now();
        let step = Step { typed: typed.into(), began: now, lines: Vec::new(), ended: now };
        if let Some(scene) = self.scenes.last_mut() {
            scene.steps.push(step);
        }
    }

    /// The command has written a line.
    pub fn line(&mut self, text: &str) {
        let now = self.now();
        if let Some(step) = self.step() {
            step.lines.push((now, text.chars().filter(|c| !c.is_control()).collect()));
        }
    }

    /// The command has ended.
    pub fn end(&mut self) {
        let now = self.now();
        if let Some(step) = self.step() {
            step.ended = now;
        }
    }

    /// What was recorded; scenes in which nothing was typed are left out.
    pub fn finish(self, about: String) -> Recording {
        let scenes: Vec<Scene> = self.scenes.into_iter().filter(|scene| !scene.steps.is_empty()).collect();
        let steps = || scenes.iter().flat_map(|scene| &scene.steps);
        let lines = steps().flat_map(|step| step.lines.iter().map(|(_, line)| line.chars().count()));
        let typed = steps().map(|step| PROMPT.len() + step.typed.chars().count());
        let columns = lines.chain(typed).max().unwrap_or(0);
        Recording { about, columns, scenes }
    }
}

impl Recording {
    /// As an asciicast: markers are titles, and a prompt is there when a command has ended.
    pub fn to_cast(&self) -> String {
        let rows = 24;
        let mut text = json!({"version": 2, "width": self.columns, "height": rows, "title": self.about}).to_string();
        let mut event = |time: f64, kind: &str, data: &str| {
            text.push('\n');
            text.push_str(&json!([time, kind, data]).to_string());
        };
        for scene in &self.scenes {
            let began = scene.steps.first().map_or(0.0, |step| step.began);
            event(began, "m", &scene.title);
            for step in &scene.steps {
                event(step.began, "o", PROMPT);
                event(step.began, "i", &format!("{}\r", step.typed));
                event(step.began, "o", &format!("{}\r\n", step.typed));
                for (time, line) in &step.lines {
                    event(*time, "o", &format!("{line}\r\n"));
                }
                event(step.ended, "m", "");
            }
        }
        text.push('\n');
        text
    }

    /// Reads what [`Recording::to_cast`] wrote.
    ///
    /// # Errors
    /// When it is something else.
    pub fn from_cast(text: &str) -> Result<Recording> {
        let mut lines = text.lines();
        let header: Value = serde_json::from_str(lines.next().context("the recording is empty")?)?;
        ensure!(header["version"] == 2, "the recording is no asciicast of version 2");
        let about = header["title"].as_str().context("the recording has no title")?.to_string();
        let columns = header["width"].as_u64().context("the recording has no width")? as usize;
        let mut scenes: Vec<Scene> = Vec::new();
        // The echo of what is typed is no output.
        let mut echo = false;
        for line in lines {
            let (time, kind, data): (f64, String, String) = serde_json::from_str(line)?;
            if kind == "m" && !data.is_empty() {
                scenes.push(Scene { title: data, steps: Vec::new() });
                continue;
            }
            let steps = &mut scenes.last_mut().context("the recording begins without a title")?.steps;
            match (kind.as_str(), steps.last_mut()) {
                ("i", _) => {
                    let typed = data.trim_end_matches('\r').to_string();
                    steps.push(Step { typed, began: time, lines: Vec::new(), ended: time });
                    echo = true;
                }
                ("o", _) if data == PROMPT => {}
                ("o", Some(_)) if std::mem::take(&mut echo) => {}
                ("o", Some(step)) => step.lines.push((time, data.trim_end_matches("\r\n").to_string())),
                ("m", Some(step)) => step.ended = time,
                _ => anyhow::bail!("the recording is not understood: {line}"),
            }
        }
        Ok(Recording { about, columns, scenes })
    }

    /// As text, with the seconds that each command took.
    pub fn to_text(&self) -> String {
        let mut text = format!("{}\nThe seconds in brackets are those that each command took.\n", self.about);
        for scene in &self.scenes {
            text.push_str(&format!("\n== {}\n", scene.title));
            for step in &scene.steps {
                text.push_str(&format!("{PROMPT}{}\n", step.typed));
                for (_, line) in &step.lines {
                    text.push_str(line.trim_end());
                    text.push('\n');
                }
                text.push_str(&format!("[{:.1} s]\n", step.took()));
            }
        }
        text
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A recording of two scenes.
    pub fn sample() -> Recording {
        let step = |typed: &str, began: f64, lines: &[(f64, &str)], ended: f64| {
            let lines = lines.iter().map(|(time, line)| (*time, line.to_string())).collect();
            Step { typed: typed.into(), began, lines, ended }
        };
        let one = step("puter list", 1.5, &[(1.75, "NAME  STATUS"), (1.75, "")], 1.9);
        let two = step("puter ssh web 'a <b> & c'", 2.0, &[(62.0, "$ a \"b\" <c>")], 102.0);
        let scene = |title: &str, step| Scene { title: title.into(), steps: vec![step] };
        Recording { about: "On a test".into(), columns: 27, scenes: vec![scene("First", one), scene("Second", two)] }
    }

    #[test]
    fn a_cast_is_read_as_it_was_written() {
        let recording = sample();
        assert_eq!(Recording::from_cast(&recording.to_cast()).unwrap(), recording);
        for line in recording.to_cast().lines().skip(1) {
            assert!(serde_json::from_str::<(f64, String, String)>(line).is_ok(), "{line}");
        }
    }

    #[test]
    fn a_cast_that_is_damaged_is_refused() {
        let cast = sample().to_cast();
        for (from, to) in [("\"version\":2", "\"version\":3"), ("\"m\"", "\"x\""), ("[1.5,\"m\",\"First\"]\n", "")] {
            assert!(cast.contains(from), "{cast}");
            assert!(Recording::from_cast(&cast.replacen(from, to, 1)).is_err(), "{from}");
        }
    }

    #[test]
    fn a_recorder_keeps_the_order_and_the_time() {
        let mut recorder = Recorder::default();
        recorder.scene("Nothing is typed here");
        recorder.scene("Title");
        recorder.begin("sleep");
        std::thread::sleep(std::time::Duration::from_millis(30));
        recorder.line("so\x1b[1m long");
        recorder.end();
        let recording = recorder.finish("about".into());
        let [scene] = recording.scenes.as_slice() else { panic!("{recording:?}") };
        let [step] = scene.steps.as_slice() else { panic!("{recording:?}") };
        assert_eq!(
            (scene.title.as_str(), step.typed.as_str(), step.lines[0].1.as_str()),
            ("Title", "sleep", "so[1m long")
        );
        assert!(
            step.took() >= 0.03 && step.lines[0].0 >= step.began + 0.03 && step.ended >= step.lines[0].0,
            "{step:?}"
        );
        assert_eq!(recording.columns, "so[1m long".len());
    }

    #[test]
    fn the_transcript_has_everything_in_order() {
        let text = sample().to_text();
        let wanted = "\n== First\n$ puter list\nNAME  STATUS\n\n[0.4 s]\n\n== Second\n$ puter ssh web 'a <b> & c'\n\
                      $ a \"b\" <c>\n[100.0 s]\n";
        assert!(text.starts_with("On a test\n") && text.ends_with(wanted), "{text}");
    }
}
