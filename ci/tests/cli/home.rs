//! A folder to run karat in, and what it left.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;

/// Every way in which a run may end.
const CODES: [i32; 13] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 130];

/// A temporary folder that is the current folder of what runs in it.
pub(crate) struct Home(tempfile::TempDir);

/// How a run ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Home {
    /// An empty one.
    pub(crate) fn new() -> Home {
        Home(tempfile::tempdir().unwrap())
    }

    /// One with a `golden` folder that holds copies of these recordings.
    pub(crate) fn with(recordings: &[&str]) -> Home {
        let home = Home::new();
        copy(&golden().join("questions"), &home.path("golden/questions"));
        for id in recordings {
            let place = format!("golden/recordings/{id}");
            copy(&golden().join("recordings").join(id), &home.path(&place));
        }
        home
    }

    /// A place inside.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The program, with nothing of karat in its environment.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_karat"));
        command.current_dir(self.0.path()).args(args).stdin(Stdio::null());
        let set = std::env::vars_os().map(|(name, _)| name);
        for name in set.filter(|name| name.to_string_lossy().starts_with("KARAT_")) {
            command.env_remove(name);
        }
        command
    }

    /// Runs it, and asserts what holds of every run.
    pub(crate) fn karat(&self, args: &[&str]) -> Ran {
        self.run(&mut self.command(args))
    }

    /// Runs a command made by [`Home::command`].
    pub(crate) fn run(&self, command: &mut Command) -> Ran {
        let verdict = self.path("target/karat/verdict.json");
        let _ = fs::remove_file(&verdict);
        let output = command.output().unwrap();
        let ran = Ran {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        };
        assert!(CODES.contains(&ran.code), "{command:?}: {ran:?}");
        let args: Vec<_> = command.get_args().map(|a| a.to_string_lossy().into_owned()).collect();
        let given = |name: &str| args.iter().any(|arg| arg == name);
        if !given("crash") {
            assert!(!ran.err.contains("panicked"), "{command:?}: {ran:?}");
        }
        if given("jsonl") && !given("schema") {
            let schema = schema("results");
            for line in ran.all_lines() {
                conforms(&line, &schema).unwrap_or_else(|why| panic!("{command:?}: {why}: {line}"));
            }
        }
        if !given("--verdict") && !given("--help") && !given("--version") {
            let text = fs::read_to_string(&verdict)
                .unwrap_or_else(|e| panic!("{command:?}: no verdict: {e}: {ran:?}"));
            let value: Value = serde_json::from_str(&text).unwrap();
            conforms(&value, &schema("verdict")).unwrap();
            assert_eq!(value["exit"], ran.code, "{command:?}");
        }
        ran
    }

    /// Runs it, asserts its exit code, and returns all it said on stderr.
    pub(crate) fn ends(&self, code: i32, args: &[&str]) -> String {
        let ran = self.karat(args);
        assert_eq!(ran.code, code, "{args:?}: {ran:?}");
        ran.err
    }

    /// Runs it, asserts its exit code and that the last line on stderr holds all of `said`.
    pub(crate) fn says(&self, code: i32, args: &[&str], said: &[&str]) {
        let err = self.ends(code, args);
        let last = err.lines().last().unwrap_or_default();
        for said in said {
            assert!(last.contains(said), "{args:?}: expected {said:?} in {last:?}");
        }
    }

    /// Writes `input_ids`, and a mask if one is given.
    pub(crate) fn tokens(&self, name: &str, rows: &[&[i64]], mask: Option<&[&[i64]]>) {
        let bytes = |rows: &[&[i64]]| -> Vec<u8> {
            rows.iter().flat_map(|row| row.iter().flat_map(|id| id.to_le_bytes())).collect()
        };
        let shape = vec![rows.len(), rows.first().map_or(0, |row| row.len())];
        let (ids, mask) = (bytes(rows), mask.map(bytes));
        let view = |data| TensorView::new(Dtype::I64, shape.clone(), data).unwrap();
        let mut views = vec![("input_ids", view(&ids[..]))];
        views.extend(mask.as_ref().map(|mask| ("attention_mask", view(&mask[..]))));
        fs::write(self.path(name), safetensors::serialize(views, None).unwrap()).unwrap();
    }

    /// Names of everything in a folder, hidden files included.
    pub(crate) fn names(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(folder)).unwrap();
        let mut names: Vec<_> =
            entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// Changes bytes of a tensor of a file.
    pub(crate) fn poke(&self, file: &str, tensor: &str, at: usize, with: &[u8]) {
        let path = self.path(file);
        let mut bytes = fs::read(&path).unwrap();
        let start = {
            let parsed = SafeTensors::deserialize(&bytes).unwrap();
            parsed.tensor(tensor).unwrap().data().as_ptr() as usize - bytes.as_ptr() as usize
        };
        bytes[start + at..start + at + with.len()].copy_from_slice(with);
        fs::write(path, bytes).unwrap();
    }
}

impl Ran {
    /// stdout as JSON, one value per line, without what a run begins and ends with.
    pub(crate) fn lines(&self) -> Vec<Value> {
        let mut lines = self.all_lines();
        lines.retain(|line| line["run"].is_null() && line["kind"] != "end");
        lines
    }

    /// stdout as JSON, one value per line.
    pub(crate) fn all_lines(&self) -> Vec<Value> {
        let parse = |line: &str| -> Value {
            serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))
        };
        let lines: Vec<Value> = self.out.lines().map(parse).collect();
        assert!(lines.iter().all(Value::is_object), "{}", self.out);
        lines
    }
}

/// The folder of the repository.
pub(crate) fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden")
}

/// Copies a folder.
pub(crate) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Every tensor of a file: type, shape, bytes.
pub(crate) fn tensors(path: &Path) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(path).unwrap();
    let parsed = SafeTensors::deserialize(&bytes).unwrap();
    parsed
        .iter()
        .map(|(name, x)| (name.to_owned(), (x.dtype(), x.shape().to_vec(), x.data().to_vec())))
        .collect()
}

/// A published schema, as karat prints it.
pub(crate) fn schema(which: &str) -> Value {
    let path = format!("{}/src/schema/{which}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// The words of JSON Schema that the published ones use.
pub(crate) fn conforms(value: &Value, schema: &Value) -> Result<(), String> {
    for (key, rule) in schema.as_object().ok_or("a schema is an object")? {
        let ok = match key.as_str() {
            "$schema" | "title" | "description" => true,
            "const" => value == rule,
            "enum" => rule.as_array().is_some_and(|all| all.contains(value)),
            "type" => match rule {
                Value::Array(kinds) => kinds.iter().any(|kind| is(value, kind)),
                kind => is(value, kind),
            },
            "required" => {
                let names = rule.as_array().ok_or("required is a list")?;
                // It says what objects have, and nothing of null.
                let has =
                    |name: &Value| name.as_str().is_some_and(|name| value.get(name).is_some());
                !value.is_object() || names.iter().all(has)
            }
            "items" => {
                for item in value.as_array().into_iter().flatten() {
                    conforms(item, rule)?;
                }
                true
            }
            "properties" => {
                for (name, rule) in rule.as_object().into_iter().flatten() {
                    if let Some(value) = value.get(name) {
                        conforms(value, rule).map_err(|why| format!("{name}: {why}"))?;
                    }
                }
                true
            }
            _ => return Err(format!("the schema says {key}, which this test cannot check")),
        };
        if !ok {
            return Err(format!("{key} {rule}"));
        }
    }
    Ok(())
}

fn is(value: &Value, kind: &Value) -> bool {
    match kind.as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("integer") => value.is_i64() || value.is_u64(),
        Some("number") => value.is_number(),
        Some("boolean") => value.is_boolean(),
        Some("null") => value.is_null(),
        _ => false,
    }
}

/// Digits of errors and times vary from machine to machine: numbers with a point or an exponent, and
/// what follows `ULP`.
pub(crate) const DIGITS: &[(&str, &str)] = &[
    (r"-?\d+(\.\d+)?e-?\d+", "[n]"),
    (r"-?\d+\.\d+", "[n]"),
    (r"(p99|max) \d+", "$1 [n]"),
    (r"\d+x of", "[n]x of"),
    (r"infx of", "[n]x of"),
];

/// What is said beside tables, whose columns are as wide as a time happens to be.
pub(crate) fn words(out: &str) -> String {
    let table = |line: &&str| !line.starts_with(['┌', '│', '╞', '├', '└']);
    out.lines().filter(table).collect::<Vec<_>>().join("\n")
}
