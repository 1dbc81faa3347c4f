//! The chat template of a tokenizer, rendered as transformers renders it.

use std::path::Path;

use minijinja::{Environment, Error, ErrorKind, Value};

use crate::exit::refuse;

/// A chat template.
pub(crate) struct Template {
    environment: Environment<'static>,
    origin: String,
}

impl Template {
    /// From `chat_template.jinja`, or from `tokenizer_config.json`; `None` if neither has one.
    pub(crate) fn load(dir: &Path) -> anyhow::Result<Option<Template>> {
        let jinja = dir.join("chat_template.jinja");
        let config = dir.join("tokenizer_config.json");
        let (text, origin) = if jinja.exists() {
            let text = golden::file::text(&jinja)
                .map_err(|e| refuse(format!("{}: {e}", jinja.display())))?;
            (text, jinja)
        } else if config.exists() {
            let text = golden::file::text(&config)
                .map_err(|e| refuse(format!("{}: {e}", config.display())))?;
            let value: serde_json::Value = serde_json::from_str(&text)
                .map_err(|e| refuse(format!("{}: {e}", config.display())))?;
            match value.get("chat_template").and_then(serde_json::Value::as_str) {
                Some(text) => (text.to_owned(), config),
                None => return Ok(None),
            }
        } else {
            return Ok(None);
        };
        let origin = origin.display().to_string();
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment
            .add_template_owned("chat", text)
            .map_err(|e| refuse(format!("{origin}: chat_template: {}", one_line(&e))))?;
        Ok(Some(Template { environment, origin }))
    }

    /// The text of a conversation. `context` holds `messages`, optionally `tools`,
    /// `add_generation_prompt`, `enable_thinking`.
    pub(crate) fn render(&self, context: &serde_json::Value) -> anyhow::Result<String> {
        let template = self
            .environment
            .get_template("chat")
            .map_err(|e| refuse(format!("{}: {e}", self.origin)))?;
        template
            .render(Value::from_serialize(context))
            .map_err(|e| refuse(format!("{}: chat_template: {}", self.origin, one_line(&e))))
    }
}

fn one_line(error: &Error) -> String {
    error.to_string().replace('\n', " ")
}

/// JSON as Python's `json.dumps(…, ensure_ascii=False)` writes it: a space after commas and colons.
fn tojson(value: &Value) -> Result<String, Error> {
    let json = serde_json::to_value(value)
        .map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("tojson: {e}")))?;
    let mut text = String::new();
    write(&json, &mut text);
    Ok(text)
}

fn write(json: &serde_json::Value, out: &mut String) {
    match json {
        serde_json::Value::Array(list) => {
            out.push('[');
            for (i, item) in list.iter().enumerate() {
                out.push_str(if i == 0 { "" } else { ", " });
                write(item, out);
            }
            out.push(']');
        }
        serde_json::Value::Object(map) => {
            out.push('{');
            for (i, (key, item)) in map.iter().enumerate() {
                out.push_str(if i == 0 { "" } else { ", " });
                out.push_str(&serde_json::Value::String(key.clone()).to_string());
                out.push_str(": ");
                write(item, out);
            }
            out.push('}');
        }
        other => out.push_str(&other.to_string()),
    }
}
