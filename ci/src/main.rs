//! tmp
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let w = golden::open(&a[2]).unwrap();
    if a[1] == "synth" {
        golden::synth::write(
            &*w,
            std::path::Path::new(&a[3]),
            golden::synth::Options { shard_bytes: 5 << 30, force: true },
            &mut |_, _| true,
        )
        .unwrap();
        return;
    }
    let ids: Vec<u32> = a[3].split(',').map(|x| x.parse().unwrap()).collect();
    let mut e = benches::engine("reference", "f32", w).unwrap();
    e.reset(1).unwrap();
    let s = e.forward(&[ids], &Default::default()).unwrap();
    for r in s.logits.rows() {
        println!("{:?}", r.iter().take(6).collect::<Vec<_>>());
    }
}
