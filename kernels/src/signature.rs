//! What a kernel takes, as its text says: one parameter per line, outputs first, the shape behind it.

/// A kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// What it takes, in order.
    pub parameters: Vec<Parameter>,
}

/// What is passed for a parameter follows from its name:
///
/// - a pointer to what is not `const` is the output of that name, another the input of that name; where
///   both have it they end in `_out` and `_in`;
/// - `X_scales` are those of the narrowed weights `X`;
/// - an `int` in capitals is a size, told by the shapes of the tensors; `plant` is the number of the fault
///   that is in force; every other number is the scalar of that name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Its name, without `_in` or `_out`.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Sizes, outermost first; empty of numbers, and of what has no shape of its own.
    pub shape: Vec<Size>,
}

/// What a parameter is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Elements that are read, of the type of that name.
    Input(String),
    /// Elements that are written.
    Output(String),
    /// `int`.
    Int,
    /// `float`.
    Float,
}

/// One size of a shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Size {
    /// A letter and what is added to it: `S + 1`.
    Plus(String, i64),
    /// A letter over a number: `R / 2`.
    Over(String, i64),
    /// A number.
    Is(i64),
    /// Some other formula.
    Some,
}

impl Size {
    /// The letter that a size tells, and its value.
    pub fn letter(&self, size: usize) -> Option<(&str, i64)> {
        let size = size as i64;
        match self {
            Size::Plus(letter, more) => Some((letter, size - more)),
            Size::Over(letter, by) => Some((letter, size * by)),
            Size::Is(_) | Size::Some => None,
        }
    }

    fn read(text: &str) -> Size {
        if let Ok(number) = text.parse() {
            return Size::Is(number);
        }
        let is_letter = |word: &str| word.chars().all(|c| c.is_ascii_uppercase());
        let words: Vec<&str> = text.split(' ').collect();
        match words[..] {
            [letter] if is_letter(letter) => Size::Plus(letter.to_owned(), 0),
            [letter, sign, number] if is_letter(letter) => match (sign, number.parse::<i64>()) {
                ("+", Ok(number)) => Size::Plus(letter.to_owned(), number),
                ("-", Ok(number)) => Size::Plus(letter.to_owned(), -number),
                ("/", Ok(number)) => Size::Over(letter.to_owned(), number),
                _ => Size::Some,
            },
            _ => Size::Some,
        }
    }
}

/// Every kernel of a text.
pub(crate) fn entries(file: &str, text: &str) -> Vec<Entry> {
    let declared = text.split("extern \"C\" __global__ ").skip(1);
    let entry = |text: &str| {
        // Between them may stand how large a block or a cluster is.
        let (head, rest) =
            text.split_once("(\n").unwrap_or_else(|| panic!("{file}: no parameters"));
        let name = head.rsplit(' ').next().unwrap_or(head);
        let all = rest.split("\n{").next().unwrap_or(rest);
        let lines = all.lines().filter(|line| !line.trim().is_empty());
        let parameters =
            lines.map(|line| parameter(line).unwrap_or_else(|| panic!("{file}: {line}")));
        Entry { name: name.to_owned(), parameters: parameters.collect() }
    };
    declared.map(entry).collect()
}

fn parameter(line: &str) -> Option<Parameter> {
    let (code, comment) = line.split_once("//").unwrap_or((line, ""));
    let code = code.trim().trim_end_matches([',', ')']).replace("__restrict__ ", "");
    let (kind, name) = code.rsplit_once(' ')?;
    let kind = match (kind.strip_suffix('*'), kind) {
        (Some(element), _) => match element.strip_prefix("const ") {
            Some(element) => Kind::Input(element.to_owned()),
            None => Kind::Output(element.to_owned()),
        },
        (None, "int") => Kind::Int,
        (None, "float") => Kind::Float,
        _ => return None,
    };
    let shape = comment.trim().strip_prefix('[').and_then(|rest| rest.split_once(']'));
    let sizes = shape.map(|(sizes, _)| sizes.split(", ").map(Size::read).collect());
    let name = name.strip_suffix("_in").or(name.strip_suffix("_out")).unwrap_or(name);
    Some(Parameter { name: name.to_owned(), kind, shape: sizes.unwrap_or_default() })
}

#[cfg(test)]
mod tests {
    use super::{Kind, Parameter, Size, entries};

    #[test]
    fn a_signature_is_read_as_it_is_written() {
        let text = "\
// x_naive: one thread.
extern \"C\" __global__ void __launch_bounds__(256, 1) x_naive(
    float* __restrict__ state_out,             // [S, W - 1]
    const long long* __restrict__ cu_seqlens,  // [S + 1] first rows
    const E* __restrict__ state_in,            // [ceil(M / 2), 1], or none
    float eps,
    int W)
{
    return;
}
";
        let [entry] = &entries("x.cu", text)[..] else { panic!("one entry") };
        let letter = |letter: &str, more| Size::Plus(letter.to_owned(), more);
        let named = |name: &str, kind, shape| Parameter { name: name.to_owned(), kind, shape };
        assert_eq!(entry.name, "x_naive");
        assert_eq!(
            entry.parameters,
            [
                named("state", Kind::Output("float".into()), vec![letter("S", 0), letter("W", -1)]),
                named("cu_seqlens", Kind::Input("long long".into()), vec![letter("S", 1)]),
                named("state", Kind::Input("E".into()), vec![Size::Some, Size::Is(1)]),
                named("eps", Kind::Float, vec![]),
                named("W", Kind::Int, vec![]),
            ]
        );
        assert_eq!(letter("W", -1).letter(3), Some(("W", 4)));
        assert_eq!(Size::read("R / 2").letter(3), Some(("R", 6)));
    }
}
