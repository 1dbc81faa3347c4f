//! Text to tokens and back, with a checkpoint's own tokenizer.

use std::{
    io::{BufRead, Write},
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use tokenizers::Tokenizer;

use crate::{
    chat::Template,
    exit::{Exit, refuse},
};

/// `tokenizer.json` of a folder.
pub(crate) struct Text {
    tokenizer: Tokenizer,
    origin: String,
}

impl Text {
    /// Reads it.
    pub(crate) fn load(dir: &Path) -> anyhow::Result<Text> {
        let path = dir.join("tokenizer.json");
        let origin = path.display().to_string();
        if !path.exists() {
            return Err(refuse(format!(
                "{origin}: not found; --tokenizer DIR says where it is, --tokens does without"
            )));
        }
        let tokenizer = Tokenizer::from_file(&path)
            .map_err(|e| refuse(format!("{origin}: {}", e.to_string().replace('\n', " "))))?;
        Ok(Text { tokenizer, origin })
    }

    /// Ids of a text; special tokens in it are recognised, none are added.
    pub(crate) fn encode(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        let encoding = self
            .tokenizer
            .encode(text, false)
            .map_err(|e| refuse(format!("{}: {e}", self.origin)))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of ids.
    pub(crate) fn decode(&self, ids: &[u32], skip_special: bool) -> anyhow::Result<String> {
        self.tokenizer
            .decode(ids, skip_special)
            .map_err(|e| refuse(format!("{}: {e}", self.origin)))
    }
}

/// Text that comes token by token: only whole characters are given out.
pub(crate) struct Stream<'a> {
    text: &'a Text,
    ids: Vec<u32>,
    told: usize,
}

impl<'a> Stream<'a> {
    /// An empty text.
    pub(crate) fn new(text: &'a Text) -> Stream<'a> {
        Stream { text, ids: Vec::new(), told: 0 }
    }

    /// What one more token adds for certain. A character whose bytes are spread over tokens decodes to
    /// a replacement character until its last byte is there.
    pub(crate) fn push(&mut self, id: u32) -> anyhow::Result<String> {
        self.ids.push(id);
        let all = self.text.decode(&self.ids, true)?;
        if all.ends_with('\u{fffd}') || all.len() <= self.told {
            return Ok(String::new());
        }
        let new = all.get(self.told..).unwrap_or("").to_owned();
        self.told = all.len();
        Ok(new)
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder with tokenizer.json and tokenizer_config.json
    #[arg(long)]
    tokenizer: PathBuf,
}

/// One JSON object per line: {"encode": text}, {"decode": ids, "skip_special": bool}, {"chat": context}
/// or {"stream": ids}; one JSON value per line comes back.
pub(crate) fn run(args: &Args) -> anyhow::Result<Exit> {
    let text = Text::load(&args.tokenizer)?;
    let template = Template::load(&args.tokenizer)?;
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let request: Value =
            serde_json::from_str(&line?).map_err(|e| refuse(format!("standard input: {e}")))?;
        let ids = |key: &str| -> Option<Vec<u32>> {
            request
                .get(key)?
                .as_array()?
                .iter()
                .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()))
                .collect()
        };
        let answer = if let Some(words) = request.get("encode").and_then(Value::as_str) {
            json!(text.encode(words)?)
        } else if let Some(ids) = ids("decode") {
            json!(text.decode(
                &ids,
                request.get("skip_special").and_then(Value::as_bool).unwrap_or(false)
            )?)
        } else if let Some(ids) = ids("stream") {
            let mut stream = Stream::new(&text);
            json!(ids.into_iter().map(|id| stream.push(id)).collect::<anyhow::Result<Vec<_>>>()?)
        } else if let Some(context) = request.get("chat") {
            let template = template.as_ref().ok_or_else(|| refuse("no chat template"))?;
            json!(template.render(context)?)
        } else {
            return Err(refuse("standard input: expected encode, decode, stream or chat"));
        };
        writeln!(out, "{answer}")?;
    }
    Ok(Exit::Ok)
}
