//! Whole-number expressions over the letters of a case, as `kernel.toml` writes them.
//!
//! ```text
//! sum     = product { ("+" | "-") product }
//! product = atom { ("*" | "/" | "%") atom }
//! atom    = number | letter | "(" sum ")" | name "(" sum "," sum ")"
//! name    = ceil_div | min | max
//! ```

use std::{fmt, iter::Peekable, str::Chars};

/// A parsed expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expr {
    text: String,
    node: Node,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Node {
    Number(i64),
    Letter(String),
    Two(Operator, Box<Node>, Box<Node>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    Add,
    Subtract,
    Multiply,
    Divide,
    Remainder,
    CeilDiv,
    Min,
    Max,
}

/// Parentheses may be nested so deep.
const DEPTH: usize = 64;

impl Expr {
    /// Reads an expression.
    ///
    /// # Errors
    /// One line that points at the place.
    pub fn parse(text: &str) -> Result<Expr, String> {
        let mut parser = Parser { rest: text.chars().peekable(), at: 0, depth: 0 };
        let node = parser.sum().and_then(|node| {
            parser.space();
            if parser.rest.peek().is_some() { Err("an operator or the end") } else { Ok(node) }
        });
        let node = node.map_err(|expected| {
            let before: String = text.chars().take(parser.at).collect();
            let after: String = text.chars().skip(parser.at).collect();
            format!("expression {before}▸{after}: expected {expected}")
        })?;
        Ok(Expr { text: text.trim().to_owned(), node })
    }

    /// Its value, where `size` knows the letters.
    ///
    /// # Errors
    /// An unknown letter, a division by zero, or a number beyond 64 bits.
    pub fn value(&self, size: &dyn Fn(&str) -> Option<i64>) -> Result<i64, String> {
        self.node.value(size).map_err(|why| format!("{}: {why}", self.text))
    }

    /// The letters in it, in order, each once.
    pub fn letters(&self) -> Vec<&str> {
        let mut letters = Vec::new();
        self.node.letters(&mut letters);
        letters
    }

    /// If it is `X % n`: the letter and `n`.
    pub(super) fn remainder(&self) -> Option<i64> {
        match &self.node {
            Node::Two(Operator::Remainder, _, by) => match **by {
                Node::Number(n) => Some(n),
                _ => None,
            },
            _ => None,
        }
    }

    /// Whether it is one letter.
    pub(super) fn is_letter(&self) -> bool {
        matches!(self.node, Node::Letter(_))
    }
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Node {
    fn value(&self, size: &dyn Fn(&str) -> Option<i64>) -> Result<i64, String> {
        match self {
            Node::Number(number) => Ok(*number),
            Node::Letter(letter) => size(letter).ok_or_else(|| format!("no letter {letter}")),
            Node::Two(operator, left, right) => {
                let (a, b) = (left.value(size)?, right.value(size)?);
                let value = match operator {
                    Operator::Add => a.checked_add(b),
                    Operator::Subtract => a.checked_sub(b),
                    Operator::Multiply => a.checked_mul(b),
                    Operator::Divide => a.checked_div(b),
                    Operator::Remainder => a.checked_rem(b),
                    Operator::CeilDiv => {
                        b.checked_sub(1).and_then(|up| a.checked_add(up)?.checked_div(b))
                    }
                    Operator::Min => Some(a.min(b)),
                    Operator::Max => Some(a.max(b)),
                };
                value.ok_or_else(|| "divides by zero, or leaves 64 bits".to_owned())
            }
        }
    }

    fn letters<'a>(&'a self, to: &mut Vec<&'a str>) {
        match self {
            Node::Number(_) => {}
            Node::Letter(letter) => {
                if !to.contains(&letter.as_str()) {
                    to.push(letter);
                }
            }
            Node::Two(_, left, right) => {
                left.letters(to);
                right.letters(to);
            }
        }
    }
}

struct Parser<'a> {
    rest: Peekable<Chars<'a>>,
    at: usize,
    depth: usize,
}

impl Parser<'_> {
    fn next(&mut self) {
        self.rest.next();
        self.at += 1;
    }

    fn space(&mut self) {
        while self.rest.peek().is_some_and(|c| c.is_whitespace()) {
            self.next();
        }
    }

    fn take(&mut self, wanted: char) -> bool {
        self.space();
        let found = self.rest.peek() == Some(&wanted);
        if found {
            self.next();
        }
        found
    }

    fn while_(&mut self, keep: impl Fn(char) -> bool) -> String {
        let mut text = String::new();
        while let Some(&c) = self.rest.peek()
            && keep(c)
        {
            text.push(c);
            self.next();
        }
        text
    }

    fn sum(&mut self) -> Result<Node, &'static str> {
        let mut left = self.product()?;
        loop {
            let operator = match () {
                () if self.take('+') => Operator::Add,
                () if self.take('-') => Operator::Subtract,
                () => return Ok(left),
            };
            left = Node::Two(operator, Box::new(left), Box::new(self.product()?));
        }
    }

    fn product(&mut self) -> Result<Node, &'static str> {
        let mut left = self.atom()?;
        loop {
            let operator = match () {
                () if self.take('*') => Operator::Multiply,
                () if self.take('/') => Operator::Divide,
                () if self.take('%') => Operator::Remainder,
                () => return Ok(left),
            };
            left = Node::Two(operator, Box::new(left), Box::new(self.atom()?));
        }
    }

    fn atom(&mut self) -> Result<Node, &'static str> {
        self.space();
        self.depth += 1;
        if DEPTH < self.depth {
            return Err("less nesting");
        }
        let node = match self.rest.peek() {
            Some('(') => {
                self.next();
                let node = self.sum()?;
                if !self.take(')') {
                    return Err("`)`");
                }
                node
            }
            Some(c) if c.is_ascii_digit() => {
                let digits = self.while_(|c| c.is_ascii_digit());
                Node::Number(digits.parse().map_err(|_| "a number below 2^63")?)
            }
            Some(c) if c.is_ascii_alphabetic() => {
                let name = self.while_(|c| c.is_ascii_alphanumeric() || c == '_');
                if self.take('(') { self.call(&name)? } else { Node::Letter(name) }
            }
            _ => return Err("a number, a letter or `(`"),
        };
        self.depth -= 1;
        Ok(node)
    }

    fn call(&mut self, name: &str) -> Result<Node, &'static str> {
        let operator = match name {
            "ceil_div" => Operator::CeilDiv,
            "min" => Operator::Min,
            "max" => Operator::Max,
            _ => return Err("ceil_div, min or max before `(`"),
        };
        let left = self.sum()?;
        if !self.take(',') {
            return Err("`,`");
        }
        let right = self.sum()?;
        if !self.take(')') {
            return Err("`)`");
        }
        Ok(Node::Two(operator, Box::new(left), Box::new(right)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Expr;

    fn value(text: &str) -> Result<i64, String> {
        let size = |letter: &str| match letter {
            "N" => Some(100),
            "HV" => Some(32),
            _ => None,
        };
        Expr::parse(text)?.value(&size)
    }

    #[test]
    fn values() {
        for (text, want) in [
            ("1", 1),
            (" N + 1 ", 101),
            ("N - 1 - 1", 98),
            ("2 * N + HV / 3 % 7", 203),
            ("(N + 28) / HV", 4),
            ("ceil_div(N, HV)", 4),
            ("max(min(N, HV), 1)", 32),
        ] {
            assert_eq!(value(text), Ok(want), "{text}");
        }
    }

    #[test]
    fn errors_say_what_and_where() {
        for (text, want) in [
            ("", "expression ▸: expected a number, a letter or `(`"),
            ("N *", "expression N *▸: expected a number, a letter or `(`"),
            ("(N", "expression (N▸: expected `)`"),
            ("N 2", "expression N ▸2: expected an operator or the end"),
            ("floor(N, 2)", "expression floor(▸N, 2): expected ceil_div, min or max before `(`"),
            ("Q", "Q: no letter Q"),
            ("N / (HV - 32)", "N / (HV - 32): divides by zero, or leaves 64 bits"),
        ] {
            assert_eq!(value(text), Err(want.to_owned()), "{text}");
        }
        assert!(value(&"(".repeat(10_000)).is_err());
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[NHV0-9+*/%(), a-z_-]{0,40}") {
            let _ = value(&text);
        }
    }
}
