//! Builds the ciphers for CPUs with AVX-512 where the Intel Multi-Buffer Crypto library is installed
//! (Debian: libipsec-mb-dev), linked statically. Elsewhere the engine uses AWS-LC alone; `--version` says which.

use std::path::Path;
use std::{env, fs};

const SHIM: &str = "native/aead_imb.c";
const ARCHIVE: &str = "libIPSec_MB.a";
/// The first release whose job says by its features that it clears what it touched and that its self-test passed.
const FIRST: (u32, u32) = (1, 3);

fn main() {
    println!("cargo:rustc-check-cfg=cfg(ipsec_mb)");
    println!("cargo:rerun-if-changed={SHIM}");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=RETINUE_WITHOUT_IPSEC_MB");
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() != Ok("x86_64")
        || env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux")
        || env::var("HOST") != env::var("TARGET")
        || env::var_os("RETINUE_WITHOUT_IPSEC_MB").is_some()
    {
        return;
    }
    let places = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib"];
    let Some(place) = places.iter().find(|p| Path::new(p).join(ARCHIVE).is_file()) else { return };
    println!("cargo:rerun-if-changed={place}/{ARCHIVE}");
    let headers = ["/usr/include/intel-ipsec-mb.h", "/usr/local/include/intel-ipsec-mb.h"];
    let recent =
        headers.iter().filter_map(|h| fs::read_to_string(h).ok()).any(|text| version(&text) >= Some(FIRST));
    if !recent {
        return;
    }
    cc::Build::new().file(SHIM).opt_level(2).warnings_into_errors(true).compile("retinue_imb");
    println!("cargo:rustc-link-search=native={place}");
    println!("cargo:rustc-link-lib=static=IPSec_MB");
    println!("cargo:rustc-cfg=ipsec_mb");
}

/// (major, minor) of `#define IMB_VERSION_STR "1.3.0"`.
fn version(header: &str) -> Option<(u32, u32)> {
    let line = header.lines().find(|l| l.contains("define IMB_VERSION_STR"))?;
    let mut parts = line.split('"').nth(1)?.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}
