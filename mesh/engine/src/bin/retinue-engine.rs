//! The engine without Python, for benchmarks and fuzzing.

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    std::process::exit(retinue_engine::daemon::main(&args));
}
