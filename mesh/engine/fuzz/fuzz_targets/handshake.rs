#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| retinue_engine::fuzzing::handshake(data));
