//! How fast the tensor cores of the GPU are with everything at hand.

use golden::Error;
use kernels::{Build, PEAK, Source, hopper};

use super::{
    device::Buffer,
    gpu::{gpu, with},
    launch::{
        Arg::{At, Int},
        Call, Kernels, Launches, Stream,
    },
};

/// Products of bf16 with sums in f32.
pub struct Products {
    found: Buffer,
    way: Way,
    blocks: usize,
    kernels: Kernels,
}

/// How they are asked for.
#[derive(Clone, Copy)]
struct Way {
    source: &'static Source,
    entry: &'static str,
    /// Blocks of a multiprocessor.
    blocks: usize,
    /// Bytes of shared memory.
    shared: usize,
    /// Rounds of a launch.
    rounds: usize,
    /// Operations of a block in a round.
    operations: usize,
}

/// Threads of a block.
const THREADS: usize = 256;

/// Eight warps, eight products of 16 rows, 8 columns, 16 deep.
const MMA: Way = Way {
    source: &PEAK,
    entry: "peak_mma",
    blocks: 2,
    shared: 0,
    rounds: 1 << 13,
    operations: 8 * 8 * 2 * 16 * 8 * 16,
};

/// Two groups of four warps, eight products of 64 rows, 256 columns, 16 deep.
const WGMMA: Way = Way {
    source: &hopper::PEAK,
    entry: "peak_wgmma",
    blocks: 1,
    shared: 256 * 16 * 2 + 1024,
    rounds: 1 << 13,
    operations: 2 * 8 * 2 * 64 * 256 * 16,
};

impl Way {
    fn of(target: &str) -> Way {
        if hopper::PEAK.targets.contains(&target) { WGMMA } else { MMA }
    }

    /// Puts so many blocks to work.
    fn launch(
        self,
        to: &mut dyn Launches,
        found: u64,
        blocks: usize,
    ) -> Result<(), super::device::Error> {
        to.launch(&Call {
            source: self.source,
            build: Build { activations: "bf16", weights: None },
            entry: self.entry,
            grid: [blocks, 1, 1],
            threads: THREADS,
            shared: self.shared,
            early: false,
            args: &[("o", At(found)), ("ROUNDS", Int(self.rounds))],
        })
    }
}

impl Products {
    /// Compiles what multiplies.
    ///
    /// # Errors
    /// If there is no GPU.
    pub fn new() -> Result<Products, Error> {
        let gpu = gpu().as_ref().map_err(String::as_str)?;
        let way = Way::of(&gpu.target);
        let blocks = way.blocks * gpu.multiprocessors as usize;
        let found = with("products", |context| context.device.room(4))?;
        let mut products = Products { found, way, blocks, kernels: Kernels::default() };
        // The first time compiles.
        products.multiply()?;
        Ok(products)
    }

    /// Multiplies for a while; how many operations, a multiplication and an addition being two.
    ///
    /// # Errors
    /// If the GPU does not.
    pub fn multiply(&mut self) -> Result<u64, Error> {
        let Products { found, way, blocks, kernels } = self;
        with("products", |context| {
            let device = context.device.clone();
            way.launch(&mut Stream { context, kernels }, found.address(), *blocks)?;
            device.wait()
        })?;
        Ok((*blocks * way.rounds * way.operations) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::device::{Buffer, Error},
        Call, Launches, MMA, Products, WGMMA, Way,
    };
    use crate::cuda::{
        gpu,
        launch::{bind, entry},
    };

    /// Binds what is launched to its signature.
    struct Paper(usize);

    impl Launches for Paper {
        fn launch(&mut self, call: &Call<'_>) -> Result<(), Error> {
            assert!(call.source.builds().contains(&call.build), "{}", call.entry);
            let entry = entry(call.source, call.entry)?;
            self.0 += bind(&entry, call.args).map_err(Error::Compile)?.len();
            Ok(())
        }

        fn gather(&mut self, _: &Buffer, _: &Buffer, _: usize) -> Result<(), Error> {
            unreachable!("one device measures itself")
        }
    }

    #[test]
    fn both_ways_are_bound_on_paper() {
        for way in [MMA, WGMMA] {
            let mut paper = Paper(0);
            way.launch(&mut paper, 4096, 3).unwrap();
            assert_eq!(paper.0, 2, "{}", way.entry);
        }
        assert_eq!((Way::of("sm_80").entry, Way::of("sm_100a").entry), ("peak_mma", "peak_mma"));
        assert_eq!(Way::of("sm_90a").entry, "peak_wgmma");
        // Products of one tile, times tiles, warps and the two operations of each.
        assert_eq!((MMA.operations, WGMMA.operations), (262_144, 8_388_608));
    }

    #[test]
    fn a_gpu_multiplies_or_is_not_there() {
        match (gpu(), Products::new()) {
            (Ok(_), made) => assert!(0 < made.unwrap().multiply().unwrap()),
            (Err(why), made) => assert_eq!(made.err().unwrap().to_string(), *why),
        }
    }
}
