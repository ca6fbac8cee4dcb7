//! `puter config`.

use anyhow::Result;
use argh::{ArgsInfo, FromArgs};

use super::output;
use crate::vm::home::Home;
use crate::vm::settings::{Settings, config_path};

/// Show each setting, its value and where it came from.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "config")]
pub struct Config {
    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl Config {
    pub fn run(self) -> Result<()> {
        let settings = Settings::load()?;
        let home = Home::from_env()?;
        let file = config_path().map_or_else(|| "none".to_string(), |path| path.display().to_string());
        if self.json {
            let values: Vec<_> = settings
                .shown()
                .iter()
                .map(|(name, value, source)| {
                    serde_json::json!({ "name": name, "value": value, "source": source.word() })
                })
                .collect();
            return output::print_json(&serde_json::json!({ "file": file, "home": home.root(), "settings": values }));
        }
        let mut rows = vec![["SETTING", "VALUE", "FROM"].map(String::from)];
        for (name, value, source) in settings.shown() {
            let value = if value.is_empty() { "-" } else { value };
            rows.push([name.to_string(), value.to_string(), source.word().to_string()]);
        }
        output::print(&output::table(&rows));
        output::print(&format!(
            "\nfile: {file}\nhome: {}\nIn the environment a setting is PUTER_ and its name in capitals.",
            home.root().display()
        ));
        Ok(())
    }
}
