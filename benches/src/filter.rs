//! Which jobs are meant: plain words, or an expression.
//!
//! ```text
//! expression = term { "|" term }
//! term       = factor { "&" factor }
//! factor     = "!" factor | "(" expression ")" | name "(" glob ")" | letter compare number
//! name       = op | variant | dtype | fill | id | device
//! compare    = ">=" | "<=" | "!=" | "=" | ">" | "<"
//! ```
//!
//! `op(gated_delta_rule) & dtype(bf16) & T>=4096 & !fill(domain)`. In a glob `*` stands for any text.
//! A letter that the op does not have makes the comparison false.

use std::fmt;

use crate::registry::Parsed;

/// What a filter looks at.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The op's name.
    pub op: &'a str,
    /// `device/algorithm`.
    pub variant: &'a str,
    /// The whole id.
    pub id: &'a str,
    /// The spec.
    pub parsed: &'a Parsed,
}

/// Words that must all be in the id, and an expression that must hold.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    words: Vec<String>,
    expression: Option<Node>,
}

#[derive(Clone, Debug)]
enum Node {
    Any(Vec<Node>),
    All(Vec<Node>),
    Not(Box<Node>),
    Glob(Field, String),
    Size(String, Compare, u64),
}

#[derive(Clone, Copy, Debug)]
enum Field {
    Op,
    Variant,
    Dtype,
    Fill,
    Id,
    Device,
}

#[derive(Clone, Copy, Debug)]
enum Compare {
    Less,
    LessEqual,
    Equal,
    NotEqual,
    GreaterEqual,
    Greater,
}

/// What is wrong with an expression, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilterError {
    /// The expression.
    pub text: String,
    /// Position in characters.
    pub at: usize,
    /// What was expected there.
    pub expected: String,
}

impl fmt::Display for FilterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (before, after): (String, String) =
            (self.text.chars().take(self.at).collect(), self.text.chars().skip(self.at).collect());
        write!(f, "filter {before}▸{after}: expected {}", self.expected)
    }
}

impl Filter {
    /// From words and an optional expression.
    ///
    /// # Errors
    /// If the expression is none.
    pub fn new(words: &[String], expression: Option<&str>) -> Result<Filter, FilterError> {
        let expression = match expression {
            None => None,
            Some(text) => {
                let mut parser = Parser { chars: text.chars().collect(), at: 0, depth: 0 };
                let node = parser.expression()?;
                parser.skip();
                if parser.at < parser.chars.len() {
                    return Err(parser.error("&, | or the end"));
                }
                Some(node)
            }
        };
        Ok(Filter { words: words.to_vec(), expression })
    }

    /// The plain words.
    pub fn words(&self) -> &[String] {
        &self.words
    }

    /// Whether a job is meant.
    pub fn selects(&self, subject: &Subject<'_>) -> bool {
        self.words.iter().all(|word| subject.id.contains(word.as_str()))
            && self.expression.as_ref().is_none_or(|node| node.holds(subject))
    }
}

impl Node {
    fn holds(&self, s: &Subject<'_>) -> bool {
        match self {
            Node::Any(nodes) => nodes.iter().any(|node| node.holds(s)),
            Node::All(nodes) => nodes.iter().all(|node| node.holds(s)),
            Node::Not(node) => !node.holds(s),
            Node::Glob(field, pattern) => glob(
                pattern,
                match field {
                    Field::Op => s.op,
                    Field::Variant => s.variant,
                    Field::Dtype => s.parsed.dtype,
                    Field::Fill => &s.parsed.fill,
                    Field::Id => s.id,
                    Field::Device => s.variant.split('/').next().unwrap_or(""),
                },
            ),
            Node::Size(letter, compare, number) => {
                s.parsed.sizes.iter().find(|(name, _)| name == letter).is_some_and(|&(_, size)| {
                    let size = size as u64;
                    match compare {
                        Compare::Less => size < *number,
                        Compare::LessEqual => size <= *number,
                        Compare::Equal => size == *number,
                        Compare::NotEqual => size != *number,
                        Compare::GreaterEqual => size >= *number,
                        Compare::Greater => size > *number,
                    }
                })
            }
        }
    }
}

/// `*` stands for any text; everything else for itself.
fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = text.strip_prefix(parts.next().unwrap_or("")) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

/// Deeper nesting than anyone writes by hand.
const MAX_DEPTH: usize = 64;

struct Parser {
    chars: Vec<char>,
    at: usize,
    depth: usize,
}

impl Parser {
    fn error(&self, expected: &str) -> FilterError {
        FilterError {
            text: self.chars.iter().collect(),
            at: self.at,
            expected: expected.to_owned(),
        }
    }

    fn skip(&mut self) {
        while self.chars.get(self.at).is_some_and(|c| c.is_whitespace()) {
            self.at += 1;
        }
    }

    fn take(&mut self, wanted: char) -> bool {
        self.skip();
        let found = self.chars.get(self.at) == Some(&wanted);
        self.at += usize::from(found);
        found
    }

    fn expression(&mut self) -> Result<Node, FilterError> {
        self.depth += 1;
        if MAX_DEPTH < self.depth {
            return Err(self.error("less nesting"));
        }
        let mut nodes = vec![self.term()?];
        while self.take('|') {
            nodes.push(self.term()?);
        }
        self.depth -= 1;
        Ok(Node::Any(nodes))
    }

    fn term(&mut self) -> Result<Node, FilterError> {
        let mut nodes = vec![self.factor()?];
        while self.take('&') {
            nodes.push(self.factor()?);
        }
        Ok(Node::All(nodes))
    }

    fn factor(&mut self) -> Result<Node, FilterError> {
        let mut negated = false;
        while self.take('!') {
            negated = !negated;
        }
        let node = if self.take('(') {
            let node = self.expression()?;
            if !self.take(')') {
                return Err(self.error(")"));
            }
            node
        } else {
            self.atom()?
        };
        Ok(if negated { Node::Not(Box::new(node)) } else { node })
    }

    fn atom(&mut self) -> Result<Node, FilterError> {
        self.skip();
        let start = self.at;
        let name = self.run(|c| c.is_alphanumeric() || c == '_');
        if self.take('(') {
            let field = match name.as_str() {
                "op" => Field::Op,
                "variant" => Field::Variant,
                "dtype" => Field::Dtype,
                "fill" => Field::Fill,
                "id" => Field::Id,
                "device" => Field::Device,
                _ => {
                    self.at = start;
                    return Err(
                        self.error("op(…), variant(…), device(…), dtype(…), fill(…) or id(…)")
                    );
                }
            };
            let pattern = self.run(|c| c != ')').trim().to_owned();
            if !self.take(')') {
                return Err(self.error(")"));
            }
            return Ok(Node::Glob(field, pattern));
        }
        if name.is_empty() {
            return Err(self.error("op(…), a letter such as T, ! or ("));
        }
        self.skip();
        let compare = match self.run(|c| matches!(c, '<' | '>' | '=' | '!')).as_str() {
            "<" => Compare::Less,
            "<=" => Compare::LessEqual,
            "=" | "==" => Compare::Equal,
            "!=" => Compare::NotEqual,
            ">=" => Compare::GreaterEqual,
            ">" => Compare::Greater,
            _ => return Err(self.error("one of < <= = != >= >")),
        };
        self.skip();
        match self.run(|c| c.is_ascii_digit()).parse() {
            Ok(number) => Ok(Node::Size(name, compare, number)),
            Err(_) => Err(self.error("a number")),
        }
    }

    fn run(&mut self, wanted: impl Fn(char) -> bool) -> String {
        let start = self.at;
        while self.chars.get(self.at).is_some_and(|&c| wanted(c)) {
            self.at += 1;
        }
        self.chars[start..self.at].iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Filter, glob};

    #[test]
    fn globs() {
        for (pattern, text, want) in [
            ("", "", true),
            ("a", "ab", false),
            ("*", "anything", true),
            ("a*c", "abc", true),
            ("a*b*c", "a-b-b-c", true),
            ("*aa", "aaa", true),
            ("ab*ba", "aba", false),
        ] {
            assert_eq!(glob(pattern, text), want, "{pattern} {text}");
        }
    }

    #[test]
    fn errors_point_at_their_place() {
        let error = Filter::new(&[], Some("op(x) & T>")).unwrap_err();
        assert_eq!(error.to_string(), "filter op(x) & T>▸: expected a number");
        assert!(Filter::new(&[], Some(&"(".repeat(1000))).is_err());
    }

    proptest! {
        #[test]
        fn no_expression_panics(text in ".{0,60}|[opTD()&|!<>=0-9* ]{0,40}") {
            let _ = Filter::new(&[], Some(&text));
        }
    }
}
