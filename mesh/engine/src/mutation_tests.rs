//! The fuzz targets over mutated corpora, on stable Rust and always the same: a floor below fuzzing.

use std::path::Path;

use crate::fuzzing::TARGETS;
use crate::sim::Rng;

fn mutate(rng: &mut Rng, seed: &[u8]) -> Vec<u8> {
    let mut b = seed.to_vec();
    for _ in 0..1 + rng.below(4) {
        let at = rng.below(b.len() as u64 + 1) as usize;
        match rng.below(5) {
            0 if at < b.len() => b[at] ^= 1 << rng.below(8),
            1 if at < b.len() => b[at] = rng.below(256) as u8,
            2 => b.truncate(at),
            3 => b.insert(at, rng.below(256) as u8),
            _ => {
                let end = at + rng.below((b.len() - at) as u64 + 1) as usize;
                let part = b[at..end].to_vec();
                b.extend(part);
            }
        }
    }
    b
}

#[test]
fn corpora_and_their_mutations_keep_every_promise() {
    for (name, target) in TARGETS {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
        let seeds: Vec<Vec<u8>> = std::fs::read_dir(&dir)
            .expect("a corpus")
            .map(|f| std::fs::read(f.unwrap().path()).unwrap())
            .collect();
        assert!(seeds.len() >= 3, "{name} has a corpus");
        let mut rng = Rng(1);
        for s in &seeds {
            target(s);
        }
        let rounds = if matches!(name, "datagrams" | "handshake") { 800 } else { 10_000 };
        for _ in 0..rounds {
            let seed = &seeds[rng.below(seeds.len() as u64) as usize];
            target(&mutate(&mut rng, seed));
        }
    }
}
