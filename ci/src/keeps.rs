//! What an engine keeps keys and values in, as it is typed.

use benches::{Kept, Number};

#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Keeps {
    /// What the cpu or the cuda engine keeps keys and values in, if not what it has for its number: f32 for f32, bf16
    /// for others. int8, of the cpu engine, counts steps, one for each token and head; fp8, of the cuda engine, is
    /// float8_e4m3fn under a scale of 1
    #[arg(long, value_name = "f32|bf16|int8|fp8")]
    pub(crate) kv_cache: Option<Kept>,
}

impl Keeps {
    /// A number type, keys and values kept so.
    pub(crate) fn number(self, name: &str) -> Number<'_> {
        Number { name, kept: self.kv_cache }
    }

    /// As it is typed, with the GPUs that are asked for.
    pub(crate) fn typed(self) -> String {
        let kept = self.kv_cache.map_or(String::new(), |kept| format!(" --kv-cache {kept}"));
        let gpus = benches::gpus();
        if gpus == 1 { kept } else { format!("{kept} --gpus {gpus}") }
    }
}
