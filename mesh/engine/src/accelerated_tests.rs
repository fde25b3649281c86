//! Both libraries against each other, and what is left of a key.

use crate::accelerated::{seal, usable, Gcm};
use crate::crypto::{nonce, Aead, Cipher, Forged, TAG_LEN};

const CIPHERS: [Cipher; 2] = [Cipher::ChaCha20Poly1305, Cipher::Aes256Gcm];

/// Every length of a packet, with and without data beside it: AWS-LC opens what this seals, and the other way round.
#[test]
fn both_libraries_speak_the_same() {
    let key = std::array::from_fn(|i| (i * 37) as u8);
    let plain: Vec<u8> = (0..1600u32).map(|i| (i * i % 253) as u8).collect();
    for cipher in CIPHERS {
        let (ours, reference) = (Aead::new(cipher, &key), Aead::plain(cipher, &key));
        for length in (0..600).chain((600..1600).step_by(13)) {
            for ad in [&b""[..], b"some data beside it"] {
                let counter = (length as u64) << 40 | length as u64;
                let mut out = vec![0; length + TAG_LEN];
                let mut theirs = out.clone();
                assert_eq!(ours.seal(counter, ad, &plain[..length], &mut out), length + TAG_LEN);
                reference.seal(counter, ad, &plain[..length], &mut theirs);
                assert!(out == theirs, "{cipher:?} {length}");
                assert_eq!(ours.open(counter, ad, &mut theirs), Ok(length));
                assert_eq!(&theirs[..length], &plain[..length]);
                assert_eq!(ours.open(counter + 1, ad, &mut out.clone()), Err(Forged));
                assert_eq!(ours.open(counter, b"other", &mut out.clone()), Err(Forged));
            }
        }
    }
}

#[test]
fn long_packets_are_ours_where_the_cpu_can() {
    let key = [1; 32];
    let mut out = vec![0; 1400 + TAG_LEN];
    let sealed = seal(&key, &nonce(1), b"", &[0; 1400], &mut out);
    assert_eq!(sealed, usable().then_some(1400 + TAG_LEN));
    assert_eq!(seal(&key, &nonce(1), b"", &[0; 255], &mut out), None);
    assert_eq!(Gcm::new(&key).is_some(), usable());
}

/// Any one bit of text or tag: refused, and nothing of the text is left.
#[test]
fn a_changed_bit_is_refused_and_leaves_nothing() {
    for cipher in CIPHERS {
        let aead = Aead::new(cipher, &[9; 32]);
        let mut sealed = vec![0; 400 + TAG_LEN];
        aead.seal(1, b"", &[0xaa; 400], &mut sealed);
        for bit in 0..sealed.len() * 8 {
            let mut bad = sealed.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(aead.open(1, b"", &mut bad), Err(Forged), "{cipher:?} bit {bit}");
            assert_eq!(bad[..400], [0; 400]);
        }
        for length in 0..TAG_LEN {
            assert_eq!(aead.open(1, b"", &mut sealed.clone()[..length]), Err(Forged));
        }
    }
}

/// How often `needle` is in the writable memory of this process.
fn copies(needle: &[u8]) -> usize {
    use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
    let memory = std::fs::File::open("/proc/self/mem").unwrap();
    let maps = BufReader::new(std::fs::File::open("/proc/self/maps").unwrap());
    let (mut count, mut page) = (0, vec![0u8; 1 << 20]); // which holds copies, too
    for line in maps.lines().map(Result::unwrap).filter(|l| l.contains(" rw")) {
        let (from, rest) = line.split_once('-').unwrap();
        let mut at = u64::from_str_radix(from, 16).unwrap();
        let end = u64::from_str_radix(rest.split_once(' ').unwrap().0, 16).unwrap();
        while at < end {
            let want = page.len().min((end - at) as usize);
            if (&memory).seek(SeekFrom::Start(at)).is_err() {
                break;
            }
            let Ok(n) = (&memory).read(&mut page[..want]) else { break };
            let own = page.as_ptr_range();
            let (own, here) = (own.start as u64..own.end as u64, |i: usize| at + i as u64);
            let found = page[..n].windows(needle.len()).enumerate().step_by(8).filter(|(_, w)| *w == needle);
            count += found.filter(|(i, _)| !own.contains(&here(*i))).count();
            at += n as u64;
        }
    }
    count
}

/// The first round keys of AES-256 are the key itself: no copy may outlive the session. The second half of it is looked
/// for, since freed memory begins with the allocator's own notes.
#[test]
fn a_dropped_key_is_in_memory_no_more() {
    let mut key = crate::crypto::blank_secret();
    crate::crypto::random(&mut key[..]);
    let aead = Aead::new(Cipher::Aes256Gcm, &key);
    let mut out = vec![0; 1400 + TAG_LEN];
    aead.seal(5, b"", &[1; 1400], &mut out);
    assert_eq!(aead.open(5, b"", &mut out), Ok(1400));
    assert!(copies(&key[16..]) >= 3, "the needle, the one for a hand-over, the schedule's");
    drop(aead);
    crate::crypto::burn_stack();
    assert_eq!(copies(&key[16..]), 1, "the needle");
}

#[test]
fn threads_do_not_disturb_each_other() {
    for cipher in CIPHERS {
        let (shared, mut expected) = (Aead::new(cipher, &[3; 32]), vec![0; 1400 + TAG_LEN]);
        Aead::plain(cipher, &[3; 32]).seal(5, b"", &[1; 1400], &mut expected);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let mut out = vec![0; 1400 + TAG_LEN];
                        shared.seal(5, b"", &[1; 1400], &mut out);
                        assert_eq!(out, expected);
                        assert_eq!(shared.open(5, b"", &mut out), Ok(1400));
                    }
                });
            }
        });
    }
}
