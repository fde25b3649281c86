//! Log lines on stderr: `level retinue-engine(ifname): text`. Never a key, never a packet.

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::sync::OnceLock;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Silent,
    Error,
    Info,
    Verbose,
}

static LEVEL: AtomicU8 = AtomicU8::new(Level::Error as u8);
static NAME: OnceLock<String> = OnceLock::new();

impl Level {
    pub fn parse(s: &str) -> Option<Self> {
        Some(match s {
            "silent" => Level::Silent,
            "error" => Level::Error,
            "info" => Level::Info,
            "verbose" | "debug" => Level::Verbose,
            _ => return None,
        })
    }
}

pub fn configure(level: Level, name: &str) {
    LEVEL.store(level as u8, Relaxed);
    let _ = NAME.set(name.to_owned());
}

pub fn log(level: Level, text: &str) {
    if level as u8 <= LEVEL.load(Relaxed) && level != Level::Silent {
        let label = if level == Level::Error { "error" } else { "info" };
        eprintln!("{label} retinue-engine({}): {text}", NAME.get().map_or("-", String::as_str));
    }
}
