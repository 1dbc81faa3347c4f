//! Layered configuration: built-in, then `karat.toml`, then `KARAT_*` in the environment, then flags.
//!
//! `karat.toml` is that of the current folder or of the nearest one above that has one. Its values
//! become the defaults of the flags they are named after, so a later layer wins by being given. Names
//! of variables and built-in values are those of the command line: they stand there and nowhere else.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use clap::{ArgMatches, Command, ValueEnum, parser::ValueSource};
use golden::file;
use serde::Deserialize;
use toml::Spanned;

use crate::{
    list::{Device, SetName},
    out::Format,
};

/// The name of the file.
const NAME: &str = "karat.toml";

/// A value in the file: where it stands matters when it is refused.
type Value<T> = Option<Spanned<T>>;

/// What the file may say.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct Content {
    /// `--model` of logits, generate and inspect.
    model: Value<String>,
    /// `--engine`.
    engine: Value<String>,
    /// `--number`.
    number: Value<String>,
    /// `--set`.
    set: Value<String>,
    /// `--device`.
    device: Value<String>,
    /// Words of the filter of list, check, paths and invariance.
    filter: Value<Vec<String>>,
    /// `--seeds` of mutate.
    seeds: Value<u64>,
    /// `--memory-gib` of check and golden record.
    memory_gib: Value<f64>,
    /// `--python` of golden record.
    python: Value<String>,
    /// `--threads`.
    threads: Value<usize>,
    /// `--format`.
    format: Value<String>,
    /// `--no-progress`.
    no_progress: Value<bool>,
    /// `--verdict`.
    verdict: Value<String>,
}

/// A setting, and which commands have a flag for it.
struct Setting {
    /// Its name in the file; with `_` for `-`, that of the argument.
    key: &'static str,
    /// Commands, as typed; empty is all of them.
    commands: &'static [&'static str],
}

const MODELS: &[&str] = &["logits", "generate", "inspect"];
const ASKED: &[&str] = &["logits", "generate", "paths", "invariance"];
const SELECTED: &[&str] = &["list", "check", "paths", "invariance"];

const SETTINGS: &[Setting] = &[
    Setting { key: "model", commands: MODELS },
    Setting { key: "engine", commands: ASKED },
    Setting { key: "number", commands: ASKED },
    Setting { key: "set", commands: &["list", "check", "paths", "invariance", "mutate"] },
    Setting { key: "device", commands: SELECTED },
    Setting { key: "filter", commands: SELECTED },
    Setting { key: "seeds", commands: &["mutate"] },
    Setting { key: "memory-gib", commands: &["check", "golden record"] },
    Setting { key: "python", commands: &["golden record"] },
    Setting { key: "threads", commands: &[] },
    Setting { key: "format", commands: &[] },
    Setting { key: "no-progress", commands: &[] },
    Setting { key: "verdict", commands: &[] },
];

impl Setting {
    fn argument(&self) -> String {
        self.key.replace('-', "_")
    }
}

/// The file, read.
#[derive(Debug, Default)]
pub(crate) struct Config {
    path: PathBuf,
    /// Key, values, line.
    values: Vec<(&'static str, Vec<String>, usize)>,
}

/// A setting as it is in force.
#[derive(Clone, Debug)]
pub(crate) struct InForce {
    /// Its name.
    pub(crate) key: &'static str,
    /// Its value; empty where there is none.
    pub(crate) value: String,
    /// Which layer it comes from.
    pub(crate) from: String,
}

impl Config {
    /// That of a folder or of the nearest one above; nothing where there is none.
    ///
    /// # Errors
    /// File, line and what is wrong.
    pub(crate) fn find(folder: &Path) -> Result<Config, String> {
        let found = folder.ancestors().map(|dir| dir.join(NAME)).find(|path| path.exists());
        found.map_or(Ok(Config::default()), |path| Config::read(&path))
    }

    fn read(path: &Path) -> Result<Config, String> {
        let text = file::text(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let line = |at: usize| 1 + text.get(..at).unwrap_or("").matches('\n').count();
        let wrong = |at: usize, what: &str| format!("{}:{}: {what}", path.display(), line(at));
        let content: Content = toml::from_str(&text).map_err(|e| {
            let what = e.message().replace("unknown field", "unknown key").replace('\n', " ");
            wrong(e.span().map_or(0, |span| span.start), &what)
        })?;
        let Content {
            model,
            engine,
            number,
            set,
            device,
            filter,
            seeds,
            memory_gib,
            python,
            threads,
            format,
            no_progress,
            verdict,
        } = content;
        let mut values = Vec::new();
        let mut add = |key: &'static str, found: Option<(Range<usize>, Vec<String>)>| {
            if let Some((span, all)) = found {
                values.push((key, all, line(span.start)));
            }
        };
        for (key, value) in [
            ("model", model),
            ("engine", engine),
            ("number", number),
            ("set", checked::<SetName>(set, &wrong, "set")?),
            ("device", checked::<Device>(device, &wrong, "device")?),
            ("python", python),
            ("format", checked::<Format>(format, &wrong, "format")?),
            ("verdict", verdict),
        ] {
            add(key, value.map(|value| (value.span(), vec![value.into_inner()])));
        }
        if let Some(threads) = &threads
            && *threads.get_ref() == 0
        {
            return Err(wrong(threads.span().start, "threads: expected at least 1"));
        }
        if let Some(seeds) = &seeds
            && !(1..=1_000_000).contains(seeds.get_ref())
        {
            return Err(wrong(seeds.span().start, "seeds: expected 1 to 1000000"));
        }
        if let Some(gib) = &memory_gib
            && !(gib.get_ref().is_finite() && 0.0 < *gib.get_ref())
        {
            return Err(wrong(gib.span().start, "memory-gib: expected a number above 0"));
        }
        add("filter", filter.map(|words| (words.span(), words.into_inner())));
        add("seeds", one(seeds));
        add("memory-gib", one(memory_gib));
        add("threads", one(threads));
        add("no-progress", one(no_progress));
        Ok(Config { path: path.to_owned(), values })
    }

    /// The values of a key, and its line.
    fn get(&self, key: &str) -> Option<(&[String], usize)> {
        let found = self.values.iter().find(|(known, ..)| *known == key)?;
        Some((&found.1, found.2))
    }

    /// Where the file wants the verdict.
    pub(crate) fn verdict(&self) -> Option<PathBuf> {
        self.get("verdict").and_then(|(values, _)| values.first()).map(PathBuf::from)
    }

    /// The command line with the file's values as defaults.
    pub(crate) fn layer(&self, mut command: Command) -> Command {
        for setting in SETTINGS {
            let Some((values, _)) = self.get(setting.key) else { continue };
            let change = |command: Command| {
                command.mut_arg(setting.argument(), |argument| {
                    argument.required(false).default_values(values.to_vec())
                })
            };
            if setting.commands.is_empty() {
                command = change(command);
            }
            for path in setting.commands {
                let mut words = path.split(' ');
                let first = words.next().unwrap_or_default();
                let second = words.next();
                command = command.mut_subcommand(first, |command| match second {
                    Some(second) => command.mut_subcommand(second, change),
                    None => change(command),
                });
            }
        }
        command
    }

    /// Every setting as it is in force, by the command line as it was written and as it was typed.
    pub(crate) fn in_force(&self, command: &Command, matches: &ArgMatches) -> Vec<InForce> {
        SETTINGS.iter().filter_map(|setting| self.one(setting, command, matches)).collect()
    }

    fn one(&self, setting: &Setting, command: &Command, matches: &ArgMatches) -> Option<InForce> {
        let id = setting.argument();
        let path = setting.commands.first().map_or("", |path| *path);
        let home = path
            .split(' ')
            .filter(|word| !word.is_empty())
            .try_fold(command, |command, word| command.find_subcommand(word))?;
        let argument = home.get_arguments().find(|argument| argument.get_id() == id.as_str())?;
        let in_force =
            |value: String, from: String| Some(InForce { key: setting.key, value, from });
        // Only the flags that every command has can have been typed with this one.
        let typed = setting.commands.is_empty()
            && matches.value_source(&id) == Some(ValueSource::CommandLine);
        if typed {
            let raw = matches.get_raw(&id).into_iter().flatten();
            let words: Vec<_> = raw.map(|word| word.to_string_lossy().into_owned()).collect();
            return in_force(words.join(" "), format!("flag --{}", setting.key));
        }
        if let Some(name) = argument.get_env()
            && let Some(value) = std::env::var_os(name)
        {
            let (name, value) = (name.to_string_lossy(), value.to_string_lossy());
            return in_force(value.into_owned(), format!("environment {name}"));
        }
        if let Some((values, line)) = self.get(setting.key) {
            return in_force(values.join(" "), format!("{}:{line}", self.path.display()));
        }
        let words = argument.get_default_values().iter().map(|word| word.to_string_lossy());
        in_force(words.collect::<Vec<_>>().join(" "), "built-in".to_owned())
    }
}

/// A word of a closed set.
fn checked<T: ValueEnum>(
    value: Value<String>,
    wrong: &dyn Fn(usize, &str) -> String,
    key: &str,
) -> Result<Value<String>, String> {
    let Some(value) = value else { return Ok(None) };
    if T::from_str(value.get_ref(), false).is_ok() {
        return Ok(Some(value));
    }
    let known: Vec<String> = T::value_variants()
        .iter()
        .filter_map(|variant| Some(variant.to_possible_value()?.get_name().to_owned()))
        .collect();
    let what = format!("{key} {:?}: expected {}", value.get_ref(), known.join(", "));
    Err(wrong(value.span().start, &what))
}

/// A value as it would be typed.
fn one<T: ToString>(value: Value<T>) -> Option<(Range<usize>, Vec<String>)> {
    value.map(|value| (value.span(), vec![value.get_ref().to_string()]))
}

/// What a file of the current folder says.
pub(crate) fn here() -> Result<Config, String> {
    Config::find(&std::env::current_dir().unwrap_or_default())
}
