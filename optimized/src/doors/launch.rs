//! One launch of a CUDA kernel, as `kernel.toml` describes it.

use std::fmt;

use serde::Deserialize;

use super::expr::Expr;

/// What is known of an op by name.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// Letters of its cases.
    pub letters: &'static [&'static str],
    /// Names of its inputs, scalars too.
    pub inputs: &'static [&'static str],
    /// Names of its outputs.
    pub outputs: &'static [&'static str],
}

/// One launch: an entry, its grid, and its arguments in order.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The op that it is a part of.
    pub op: String,
    /// The `extern "C"` name of the kernel.
    pub entry: String,
    /// Blocks.
    pub grid: [Expr; 3],
    /// Threads of a block.
    pub block: [Expr; 3],
    /// Bytes of dynamic shared memory.
    pub shared: Expr,
    /// Bytes of workspace, shared by all launches of an op.
    pub workspace: Expr,
    /// Arguments.
    pub args: Vec<Arg>,
}

/// One argument of a kernel.
#[derive(Clone, Debug, PartialEq)]
pub enum Arg {
    /// A tensor's address, null where an optional one is absent.
    Tensor(Role, String),
    /// The workspace's address.
    Workspace,
    /// An expression over the letters.
    Integer(Expr, Width),
    /// One of the op's scalars.
    Scalar(String, Width),
}

/// Where a tensor belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// An input.
    Input,
    /// An output.
    Output,
    /// Whichever has the name; one of both, or it is a mistake.
    Either,
}

/// What a number is passed as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// `int`.
    I32,
    /// `long long`.
    I64,
    /// `float`.
    F32,
    /// `double`.
    F64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    op: String,
    entry: String,
    grid: Vec<Number>,
    block: Vec<Number>,
    shared: Option<Number>,
    workspace: Option<Number>,
    args: Vec<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Number {
    Integer(u32),
    Text(String),
}

impl Number {
    fn expr(&self) -> Result<Expr, String> {
        match self {
            Number::Integer(number) => Expr::parse(&number.to_string()),
            Number::Text(text) => Expr::parse(text),
        }
    }
}

impl Launch {
    /// Reads one table of `[[door.launch]]`.
    pub(super) fn read(table: toml::Table) -> Result<Launch, String> {
        let text = Text::deserialize(table)
            .map_err(|error: toml::de::Error| error.message().replace('\n', " "))?;
        let three = |what: &str, given: &[Number]| -> Result<[Expr; 3], String> {
            if given.is_empty() || 3 < given.len() {
                return Err(format!("{what}: expected one to three numbers, got {}", given.len()));
            }
            let one = Number::Integer(1);
            let at = |i: usize| {
                given.get(i).unwrap_or(&one).expr().map_err(|why| format!("{what}: {why}"))
            };
            Ok([at(0)?, at(1)?, at(2)?])
        };
        let bytes = |what: &str, given: &Option<Number>| {
            let zero = Number::Integer(0);
            let given = given.as_ref().unwrap_or(&zero);
            given.expr().map_err(|why| format!("{what}: {why}"))
        };
        Ok(Launch {
            grid: three("grid", &text.grid)?,
            block: three("block", &text.block)?,
            shared: bytes("shared", &text.shared)?,
            workspace: bytes("workspace", &text.workspace)?,
            args: text.args.iter().map(|arg| Arg::read(arg)).collect::<Result<_, _>>()?,
            op: text.op,
            entry: text.entry,
        })
    }

    /// Whether all letters, tensors and scalars are those of the op.
    pub(super) fn check(&self, op: &Known) -> Result<(), String> {
        for arg in &self.args {
            arg.check(op)?;
        }
        let letters = op.letters;
        let integers = self.args.iter().filter_map(|arg| match arg {
            Arg::Integer(expr, _) => Some(expr),
            _ => None,
        });
        let all = self.grid.iter().chain(&self.block).chain([&self.shared, &self.workspace]);
        for expr in all.chain(integers) {
            if let Some(letter) = expr.letters().into_iter().find(|one| !letters.contains(one)) {
                let known = letters.join(" ");
                return Err(format!("{expr}: expected letters {known}, got {letter}"));
            }
        }
        Ok(())
    }
}

impl fmt::Display for Arg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Arg::Tensor(Role::Input, name) => write!(f, "in.{name}"),
            Arg::Tensor(Role::Output, name) => write!(f, "out.{name}"),
            Arg::Tensor(Role::Either, name) => f.write_str(name),
            Arg::Workspace => f.write_str("workspace"),
            Arg::Integer(expr, width) => write!(f, "{expr}:{}", width.name()),
            Arg::Scalar(name, width) => write!(f, "{name}:{}", width.name()),
        }
    }
}

impl Width {
    fn name(self) -> &'static str {
        match self {
            Width::I32 => "i32",
            Width::I64 => "i64",
            Width::F32 => "f32",
            Width::F64 => "f64",
        }
    }
}

impl Arg {
    /// Whether its name is one of the op's.
    fn check(&self, op: &Known) -> Result<(), String> {
        let (name, input, output) = match self {
            Arg::Workspace | Arg::Integer(..) => return Ok(()),
            Arg::Tensor(Role::Input, name) | Arg::Scalar(name, _) => (name, true, false),
            Arg::Tensor(Role::Output, name) => (name, false, true),
            Arg::Tensor(Role::Either, name) => (name, true, true),
        };
        let has = |all: &[&str]| all.contains(&name.as_str());
        match (input && has(op.inputs), output && has(op.outputs)) {
            (true, true) => {
                Err(format!("args: {name} is an input and an output: in.{name} or out.{name}?"))
            }
            (false, false) => {
                let known =
                    |wanted, all: &[&str]| if wanted { all.join(" ") } else { String::new() };
                let all = format!("{} {}", known(input, op.inputs), known(output, op.outputs));
                Err(format!("args: expected names of {}, got {name}", all.trim()))
            }
            _ => Ok(()),
        }
    }

    /// `o`, `in.state`, `out.state`, `workspace`, `N`, `B * T`, `eps`, `N:i64`, `eps:f64`.
    ///
    /// What begins with a lower-case letter is a tensor or a scalar, unless a type behind it says
    /// that it is a scalar; everything else is an expression over letters.
    fn read(text: &str) -> Result<Arg, String> {
        let (what, width) = match text.split_once(':') {
            None => (text, None),
            Some((what, width)) => {
                let width = match width {
                    "i32" => Width::I32,
                    "i64" => Width::I64,
                    "f32" => Width::F32,
                    "f64" => Width::F64,
                    _ => return Err(format!("args: {text}: expected i32, i64, f32 or f64")),
                };
                (what, Some(width))
            }
        };
        let name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let plain = |text: &str| {
            text.starts_with(|c: char| c.is_ascii_lowercase()) && text.chars().all(name)
        };
        if what == "workspace" {
            return Ok(Arg::Workspace);
        }
        for (prefix, role) in [("in.", Role::Input), ("out.", Role::Output)] {
            if let Some(rest) = what.strip_prefix(prefix) {
                return Ok(Arg::Tensor(role, rest.to_owned()));
            }
        }
        match width {
            Some(width) if plain(what) => Ok(Arg::Scalar(what.to_owned(), width)),
            None if plain(what) => Ok(Arg::Tensor(Role::Either, what.to_owned())),
            Some(Width::F32 | Width::F64) => {
                Err(format!("args: {text}: an expression is an i32 or an i64"))
            }
            width => {
                let expr = Expr::parse(what).map_err(|why| format!("args: {why}"))?;
                Ok(Arg::Integer(expr, width.unwrap_or(Width::I32)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Arg, Known, Launch, Role, Width};

    #[test]
    fn arguments() {
        let scalar = |name: &str, width| Arg::Scalar(name.to_owned(), width);
        let tensor = |role, name: &str| Arg::Tensor(role, name.to_owned());
        for (text, want) in [
            ("o", tensor(Role::Either, "o")),
            ("in.state", tensor(Role::Input, "state")),
            ("out.state", tensor(Role::Output, "state")),
            ("eps:f32", scalar("eps", Width::F32)),
            ("top_k:i32", scalar("top_k", Width::I32)),
            ("workspace", Arg::Workspace),
        ] {
            assert_eq!(Arg::read(text).unwrap(), want);
        }
        for (text, width) in [("N", Width::I32), ("B * T:i64", Width::I64), ("128", Width::I32)] {
            assert!(matches!(Arg::read(text), Ok(Arg::Integer(_, found)) if found == width));
        }
        for text in ["N:f32", "eps:bf16", "N +", ""] {
            assert!(Arg::read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn launches() {
        let read = |text: &str| Launch::read(text.parse().expect("a table"));
        let base = "op = 'rms_norm'\nentry = 'f'\nargs = ['o', 'N']\nblock = [256]\n";
        let launch =
            read(&format!("{base}grid = ['ceil_div(N, 4)', 1]\nshared = 'D * 4'")).unwrap();
        let known =
            |letters| Known { letters, inputs: &["x", "state", "eps"], outputs: &["o", "state"] };
        assert_eq!(launch.check(&known(&["N", "D"])), Ok(()));
        let letter = Err("D * 4: expected letters N, got D".to_owned());
        assert_eq!(launch.check(&known(&["N"])), letter);
        for (arg, want) in [
            ("x", ""),
            ("in.state", ""),
            ("out.state", ""),
            ("eps:f32", ""),
            ("workspace", ""),
            ("state", "args: state is an input and an output: in.state or out.state?"),
            ("out.x", "args: expected names of o state, got x"),
            ("y", "args: expected names of x state eps o state, got y"),
            ("esp:f32", "args: expected names of x state eps, got esp"),
        ] {
            let said = Arg::read(arg).unwrap().check(&known(&["N"]));
            assert_eq!(said.err().unwrap_or_default(), want);
        }
        assert_eq!(
            read(&format!("{base}grid = []")).err().as_deref(),
            Some("grid: expected one to three numbers, got 0")
        );
        let unknown = read(&format!("{base}grid = [1]\ngird = [1]")).err().unwrap();
        assert!(unknown.starts_with("unknown field `gird`"), "{unknown}");
    }
}
