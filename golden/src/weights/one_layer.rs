//! A model of a single layer.

use std::{borrow::Cow, ops::Range, sync::Arc};

use super::{Kept, Meta, RawTensor, Recipe, WeightError, Weights};
use crate::{Config, config::Mixer, names};

/// One layer of a model as a model of its own, between an embedding and a head of a few tokens and without a
/// draft head: what is asked of it costs what the layer costs.
pub struct OneLayer {
    weights: Arc<dyn Weights>,
    config: Config,
    /// What names of the layer begin with, in the whole model.
    prefix: String,
    layer: usize,
}

/// What names of the layer begin with here.
const OWN: &str = "model.layers.0.";

/// Tokens of the vocabulary.
const TOKENS: usize = 64;

impl OneLayer {
    /// The first layer of a kind, if there is one.
    pub fn first(weights: Arc<dyn Weights>, mixer: Mixer) -> Option<OneLayer> {
        let whole = weights.config();
        let layer = whole.layer_types.iter().position(|&own| own == mixer)?;
        let mut config = whole.clone();
        config.layer_types = vec![mixer];
        config.mlp_types = vec![whole.mlp_types[layer]];
        config.vocab_size = TOKENS.min(whole.vocab_size);
        Some(OneLayer { weights, config, prefix: format!("model.layers.{layer}."), layer })
    }

    /// Which one it is of the whole model.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// What a tensor is called in the whole model; `None` of one that is left out.
    fn whole<'a>(&self, name: &'a str) -> Option<Cow<'a, str>> {
        if let Some(rest) = name.strip_prefix(OWN) {
            return Some(Cow::Owned(format!("{}{rest}", self.prefix)));
        }
        (!name.starts_with("mtp.") && !name.starts_with("model.layers."))
            .then_some(Cow::Borrowed(name))
    }

    fn known<'a>(&self, name: &'a str) -> Result<Cow<'a, str>, WeightError> {
        self.whole(name).ok_or_else(|| WeightError(format!("{}: no tensor {name}", self.origin())))
    }
}

/// Whether only some rows of a tensor are of this model.
fn is_cut(name: &str) -> bool {
    [names::EMBED_TOKENS, names::LM_HEAD].contains(&name)
}

impl Weights for OneLayer {
    fn config(&self) -> &Config {
        &self.config
    }

    fn origin(&self) -> String {
        format!("layer {} of {}", self.layer, self.weights.origin())
    }

    fn meta(&self, name: &str) -> Option<Meta> {
        let mut meta = self.weights.meta(&self.whole(name)?)?;
        if is_cut(name) {
            meta.shape[0] = self.config.vocab_size;
        }
        Some(meta)
    }

    fn fetch(&self, name: &str) -> Result<RawTensor<'_>, WeightError> {
        if is_cut(name) {
            return self.fetch_rows(name, 0..self.config.vocab_size);
        }
        self.weights.fetch(&self.known(name)?)
    }

    fn fetch_rows(&self, name: &str, rows: Range<usize>) -> Result<RawTensor<'_>, WeightError> {
        self.weights.fetch_rows(&self.known(name)?, rows)
    }

    fn keep(&self, name: &str) -> Result<Kept, WeightError> {
        if is_cut(name) {
            let RawTensor { dtype, shape, data } = self.fetch(name)?;
            let (meta, data) = (Meta { dtype, shape }, data.into_owned());
            let bytes = 0..data.len();
            return Ok(Kept::new(meta, Arc::new(data), bytes));
        }
        self.weights.keep(&self.known(name)?)
    }

    fn pass(&self, name: &str) -> Result<Kept, WeightError> {
        if is_cut(name) { self.keep(name) } else { self.weights.pass(&self.known(name)?) }
    }

    fn is_mapped(&self, name: &str, align: usize) -> bool {
        !is_cut(name) && self.whole(name).is_some_and(|name| self.weights.is_mapped(&name, align))
    }

    fn recipe(&self, name: &str) -> Option<Recipe> {
        self.weights.recipe(&self.whole(name)?)
    }

    fn names(&self) -> Vec<String> {
        let own = |name: String| {
            if let Some(rest) = name.strip_prefix(&self.prefix) {
                return Some(format!("{OWN}{rest}"));
            }
            let kept = !name.starts_with("model.layers.") && self.whole(&name).is_some();
            kept.then_some(name)
        };
        self.weights.names().into_iter().filter_map(own).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::OneLayer;
    use crate::{
        Weights,
        config::{Mixer, Preset},
        names,
        synthetic::Synthetic,
    };

    #[test]
    fn a_layer_is_a_model() {
        let whole: Arc<dyn Weights> =
            Arc::new(Synthetic::new(Preset::Tiny.config(Some(4), None).unwrap(), 0));
        for (mixer, layer) in [(Mixer::Linear, 0), (Mixer::Full, 3)] {
            let one = OneLayer::first(whole.clone(), mixer).unwrap();
            assert_eq!((one.layer(), &one.config().layer_types[..]), (layer, &[mixer][..]));
            assert_eq!(one.meta(names::MTP_FC), None);
            let entries = names::entries(one.config(), false);
            for entry in &entries {
                let meta = one.meta(&entry.name).unwrap();
                assert_eq!(meta.shape, entry.shape, "{}", entry.name);
                let raw = one.fetch(&entry.name).unwrap();
                assert_eq!(raw.shape, entry.shape, "{}", entry.name);
                assert_eq!(*one.keep(&entry.name).unwrap().data(), *raw.data);
            }
            let mut named: Vec<_> = entries.into_iter().map(|entry| entry.name).collect();
            let mut told = one.names();
            named.sort();
            told.sort();
            assert_eq!(told, named);
            let norm = "input_layernorm.weight";
            let of_whole = whole.fetch(&format!("model.layers.{layer}.{norm}")).unwrap();
            assert_eq!(one.fetch(&format!("model.layers.0.{norm}")).unwrap().data, of_whole.data);
            assert!(one.fetch("model.layers.1.input_layernorm.weight").is_err());
        }
        let linear = Synthetic::new(Preset::Tiny.config(Some(3), None).unwrap(), 0);
        assert!(OneLayer::first(Arc::new(linear), Mixer::Full).is_none());
    }
}
